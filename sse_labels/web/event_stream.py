"""The answer to `GET /stream`: Server-Sent Events in a body without an end.

Promises: the body is an event stream as in the HTML standard. HTTP/1.1 gets the chunked coding,
HTTP/1.0 gets plain bytes. The first bytes of the body are sent together with the head.
Does not belong here: when something is written (`delivery`), the format of an event (`sse`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from sse_labels.config import Settings
from sse_labels.feed.chunk import Chunk
from sse_labels.feed.outbox import Outbox
from sse_labels.metrics import Metrics
from sse_labels.protocol.notice import Notice
from sse_labels.protocol.sse import HEARTBEAT, chunked, encode_error, encode_id, encode_info
from sse_labels.web.delivery import Delivery, retry_ms
from sse_labels.web.door.aiohttp_seams import HeadWithBody

HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    # Turns off nginx's buffering of the response (ngx_http_proxy_module).
    "X-Accel-Buffering": "no",
}


class Plain:
    """Blocks without coding, for HTTP/1.0: the end of the connection ends the body."""

    def events(self, chunk: Chunk) -> bytes:
        """Return the frames."""
        return chunk.data

    def position(self, seq: int) -> bytes:
        """Return an id-only block."""
        return self.block(encode_id(seq))

    def heartbeat(self) -> bytes:
        """Return a comment."""
        return self.block(HEARTBEAT)

    def info(
        self, name: str, message: str, *, position: int | None = None, **more: object
    ) -> bytes:
        """Return an `info` event."""
        return self.block(encode_info(name, message, position=position, **more))

    def notice(self, notice: Notice) -> bytes:
        """Return its `info` event."""
        return notice.block

    def block(self, block: bytes) -> bytes:
        """Return `block` as the body contains it."""
        return block


class Chunked(Plain):
    """Blocks in HTTP/1.1's chunked coding."""

    def events(self, chunk: Chunk) -> bytes:
        """Return the frames in the coding that the chunk already has."""
        return chunk.wire

    def notice(self, notice: Notice) -> bytes:
        """Return its `info` event in the coding that the notice already has."""
        return notice.wire

    def block(self, block: bytes) -> bytes:
        """Return one chunk of the coding."""
        return chunked(block)


PLAIN, CHUNKED = Plain(), Chunked()


class EventStream(HeadWithBody):
    """Writes what one outbox yields as Server-Sent Events."""

    __slots__ = ("_opening", "_settings", "_wire", "delivery")

    def __init__(
        self,
        request: web.Request,
        outbox: Outbox,
        metrics: Metrics,
        settings: Settings,
        *,
        start: int,
        opening: bytes,
        ended: Callable[[str], None],
    ) -> None:
        """Stream from cursor `start`, with `opening` as the first block.

        After aiohttp has called `write_eof`, `ended` is called with the reason for the end.
        Raises ConnectionResetError when the client has left.
        """
        super().__init__(headers=HEADERS)
        self._wire = PLAIN
        if request.version >= (1, 1):
            self.enable_chunked_encoding()
            self._wire = CHUNKED
        if request.transport is None:
            raise ConnectionResetError("the client left")
        self._settings = settings
        self._opening = opening
        self.delivery = Delivery(
            request.transport, outbox, self._wire, metrics, settings, start=start, ended=ended
        )

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Encode the head, and free its headers."""
        writer = await super().prepare(request)
        if writer is not None:
            self.delivery.writer = writer
            self.headers.clear()
        return writer

    def write_eof(self, data: bytes = b"") -> Coroutine[Any, Any, None]:
        """Return the delivery's own coroutine: one around it would cost memory in each stream."""
        return self.delivery.run(self)

    async def begin(self) -> int:
        """Write the opening."""
        opening, self._opening = self._opening, b""
        # aiohttp's own write sends the head of the response too.
        await self.write(opening)
        return len(opening)

    async def finish(self, name: str, message: str) -> None:
        """Write an `error` event, and the end of the body."""
        retry = retry_ms(self._settings)
        last = encode_error(name, message, cursor=self.delivery.sent_seq, retry_ms=retry)
        self.delivery.send(self._wire.block(last))
        await super().write_eof()
