"""The peer sse-starlette on uvicorn, used as its documentation shows: a queue per connection.

python peer_sse_starlette.py PORT
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import sys
from collections.abc import AsyncIterator

import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

queues: set[asyncio.Queue[tuple[str, str]]] = set()
ids = itertools.count(1)


async def stream(request: Request) -> EventSourceResponse:
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    # Before the head is sent: what is published once the client has it reaches it.
    queues.add(queue)

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                number, data = await queue.get()
                yield ServerSentEvent(data, id=number)
        finally:
            queues.discard(queue)

    return EventSourceResponse(events())


async def publish(request: Request) -> PlainTextResponse:
    for data in (await request.body()).decode().split("\n"):
        event = (str(next(ids)), data)
        for queue in queues:
            queue.put_nowait(event)
    return PlainTextResponse("ok")


if __name__ == "__main__":
    routes = [Route("/stream", stream), Route("/publish", publish, methods=["POST"])]
    uvicorn.run(
        Starlette(routes=routes),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
        backlog=4096,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
