"""A server with the page and a stream whose answers a test gives; it counts the tries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from sse_labels.protocol.sse import encode_error, encode_frame, encode_id, encode_info
from sse_labels.web.page_files import page_files

from support.program import free_port

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

CLOSING = web.AppKey("closing", asyncio.Event)
LABEL = {"src": "did:web:a.example", "uri": "did:web:b.example", "val": "spam"}
PAGE_ELSEWHERE = """<!doctype html><body></body><script type=module>
import {{ LabelStream }} from "{door}/labels.js";
globalThis.stream = new LabelStream();
</script>"""


class Door:
    """The server of the page, with the times of all tries to open its stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.tries: list[float] = []
        self.others: list[str] = []
        self.url = ""
        #: The URL of a page of another origin; its `globalThis.stream` reads this server's stream.
        self.elsewhere = ""

    async def stream(self, request: web.Request) -> web.StreamResponse:
        self.tries.append(time.monotonic())
        return await self.answer(request)

    async def ready(self, request: web.Request) -> web.StreamResponse:
        self.others.append(request.path)
        return web.json_response({"status": "ready", "head": 9})

    async def other(self, request: web.Request) -> web.StreamResponse:
        self.others.append(request.path)
        return web.Response(status=404)


@asynccontextmanager
async def door(answer: Answer) -> AsyncIterator[Door]:
    """Serve the page, and answer its stream with `answer`."""
    opened = Door(answer)
    app = web.Application()
    app[CLOSING] = asyncio.Event()
    for path, file in page_files():
        app.router.add_get(path, file.handle)
    app.router.add_get("/stream", opened.stream)
    app.router.add_get("/health/ready", opened.ready)
    app.router.add_get("/{other:.*}", opened.other)

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Access-Control-Allow-Origin"] = "*"
        response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        # Browsers repeat a request by themselves when a reused connection breaks.
        response.force_close()

    async def page_elsewhere(request: web.Request) -> web.Response:
        text = PAGE_ELSEWHERE.format(door=opened.url)
        return web.Response(text=text, content_type="text/html")

    app.on_response_prepare.append(prepare)
    elsewhere = web.Application()
    elsewhere.router.add_get("/", page_elsewhere)
    runners = [web.AppRunner(app), web.AppRunner(elsewhere)]
    try:
        urls = []
        for runner in runners:
            await runner.setup()
            port = free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            urls.append(f"http://127.0.0.1:{port}")
        opened.url, opened.elsewhere = urls
        yield opened
    finally:
        app[CLOSING].set()
        for runner in runners:
            await runner.cleanup()


async def closes(request: web.Request) -> web.StreamResponse:
    """Close the connection without an answer."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def opens_and_closes(request: web.Request) -> web.StreamResponse:
    """Answer as a stream and end at once; `retry:` is shorter than every wait of a page."""
    return as_stream(b"retry: 1\n" + opening(7))


async def stays_open(request: web.Request) -> web.StreamResponse:
    """Answer as a stream without events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(opening(7))
    await request.app[CLOSING].wait()
    return response


async def delivers(request: web.Request) -> web.StreamResponse:
    """Answer with a stream that has one label after the cursor, and ends."""
    start = int(request.query.get("cursor", "7"))
    return as_stream(opening(start) + encode_frame(start + 1, LABEL).encode())


def opening(start: int) -> bytes:
    """Return the opening of a stream that starts after `start`."""
    more = {"cursor": start, "head": start, "epoch": "e", "heartbeatSeconds": 15}
    return encode_id(start) + encode_info("StreamOpened", "", **more)


async def is_full(request: web.Request) -> web.StreamResponse:
    """Answer as a full server answers an `EventSource`."""
    return as_stream(encode_error("TooManyConnections", "full", cursor=None, retry_ms=3000))


def says_503(retry_after: Callable[[], str]) -> Answer:
    """Answer as a full server or a proxy answers other clients than an `EventSource`."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": retry_after()})

    return answer


def as_stream(body: bytes) -> web.Response:
    """Return an event stream that ends."""
    return web.Response(body=body, headers={"Content-Type": "text/event-stream"})
