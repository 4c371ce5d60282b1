"""The peer aiohttp-sse, used as its documentation shows: a queue for each connection.

python peer_aiohttp_sse.py PORT
"""

from __future__ import annotations

import asyncio
import itertools
import sys

from aiohttp import web
from aiohttp_sse import sse_response

queues: set[asyncio.Queue[tuple[str, str]]] = set()
ids = itertools.count(1)


async def stream(request: web.Request) -> web.StreamResponse:
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    # Before the head is sent: what is published once the client has it reaches it.
    queues.add(queue)
    try:
        async with sse_response(request) as response:
            while response.is_connected():
                number, data = await queue.get()
                await response.send(data, id=number)
    finally:
        queues.discard(queue)
    return response


async def publish(request: web.Request) -> web.Response:
    for data in (await request.text()).split("\n"):
        event = (str(next(ids)), data)
        for queue in queues:
            queue.put_nowait(event)
    return web.Response(text="ok")


if __name__ == "__main__":
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/stream", stream)
    app.router.add_post("/publish", publish)
    web.run_app(
        app, host="127.0.0.1", port=int(sys.argv[1]), backlog=4096, access_log=None, print=None,
        shutdown_timeout=0, handler_cancellation=True,
    )  # fmt: skip
