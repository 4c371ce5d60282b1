"""The answer to `GET /stream`: Server-Sent Events, a body that does not end.

Promises: what the HTML standard calls an event stream, in HTTP/1.1's chunked coding or, for
HTTP/1.0, without; its first bytes leave with the head.
Does not belong here: when something is written (`delivery`), how an event looks (`sse`).
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
    # nginx: do not gather the response into blocks (ngx_http_proxy_module).
    "X-Accel-Buffering": "no",
}


class Plain:
    """Blocks as they are, for HTTP/1.0: the body ends with the connection."""

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
        """Return what stands for `block` in the body."""
        return block


class Chunked(Plain):
    """Blocks in HTTP/1.1's chunked coding."""

    def events(self, chunk: Chunk) -> bytes:
        """Return the frames, whose coding was made with the chunk."""
        return chunk.wire

    def notice(self, notice: Notice) -> bytes:
        """Return its `info` event, whose coding was made with it."""
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
        """Stream from cursor `start`; `opening` is the first block.

        Once aiohttp has asked for the body, `ended` will be called with how it ended. Raises
        ConnectionResetError when the client has left.
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
        """Encode the head, and forget what it was made of."""
        writer = await super().prepare(request)
        if writer is not None:
            self.delivery.writer = writer
            self.headers.clear()
        return writer

    def write_eof(self, data: bytes = b"") -> Coroutine[Any, Any, None]:
        """Return the delivery itself: a coroutine around it would cost each stream its frame."""
        return self.delivery.run(self)

    async def begin(self) -> int:
        """Write the opening."""
        opening, self._opening = self._opening, b""
        # By aiohttp: the head of the response goes with it.
        await self.write(opening)
        return len(opening)

    async def finish(self, name: str, message: str) -> None:
        """Write an `error` event, and the end of the body."""
        retry = retry_ms(self._settings)
        last = encode_error(name, message, cursor=self.delivery.told, retry_ms=retry)
        self.delivery.send(self._wire.block(last))
        await super().write_eof()
