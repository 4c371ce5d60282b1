"""The answer to `GET /stream`: a body that does not end.

Promises: each event reaches the socket once and in order, written by nobody but the
one task of this request, or for it while it waits; a client that does not read is cut
in bounded time.
Stands at the end of the corridor: outbox -> stream -> socket.
Does not belong here: which events there are, how they are encoded, who may read them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from sse_labels.chunk import Chunk
from sse_labels.config import Settings
from sse_labels.errors import BrokenPromise, ServerStopping, StreamClosed
from sse_labels.metrics import Metrics
from sse_labels.outbox import CaughtUp, Events, Outbox, Outdated, Silence, Step
from sse_labels.sse import HEARTBEAT, encode_error, encode_id, encode_info, encode_opening
from sse_labels.web.connection import LongAnswer, reset

log = logging.getLogger(__name__)

HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    # nginx: do not gather the response into blocks (ngx_http_proxy_module).
    "X-Accel-Buffering": "no",
}


class EventStream(LongAnswer):
    """Writes what one outbox yields to one socket.

    aiohttp asks a response for its body by `write_eof`, when the handler and all around it
    have returned: had the handler streamed, their frames would wait as long as the stream
    does, 3 KiB for each.
    """

    __slots__ = (
        "_deadline", "_ended", "_framed", "_metrics", "_news", "_now", "_outbox", "_settings",
        "_told", "_transport", "_writer", "_wrote",
    )  # fmt: skip

    #: aiohttp's own responses do so, too: the head waits for the first bytes of the body.
    _send_headers_immediately = False

    def __init__(
        self,
        request: web.Request,
        outbox: Outbox,
        metrics: Metrics,
        settings: Settings,
        *,
        start: int,
        news: bytes,
        ended: Callable[[str], None],
    ) -> None:
        """Stream from cursor `start`, `news` right after the opening.

        Once aiohttp has asked for the body, `ended` will be called with how it ended. Raises
        ConnectionResetError when the client has left.
        """
        super().__init__(headers=HEADERS)
        self._framed = request.version >= (1, 1)
        if self._framed:
            self.enable_chunked_encoding()
        if request.transport is None:
            raise ConnectionResetError("the client left")
        self._transport = request.transport
        self._outbox = outbox
        self._metrics = metrics
        self._settings = settings
        self._news = news
        self._ended = ended
        self._deadline: asyncio.Timeout | None = None
        self._now = asyncio.get_running_loop().time
        self._wrote = self._now()
        #: The last seq that the client was told.
        self._told = start

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Encode the head, and forget what it was made of."""
        writer = await super().prepare(request)
        if writer is not None:
            self._writer = writer
            self.headers.clear()
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Stream until the client leaves, the consumer lags or the server stops."""
        how = "ClientGone"
        try:
            await self._begin()
            await self._drain()
            async for step in self._outbox.events(self._told):
                self._write(step)
                await self._drain()
        except StreamClosed as closed:
            how = await self._end(closed.name, closed.name, str(closed))
        except BrokenPromise as error:
            self._metrics.count["broken_promises"] += 1
            log.exception("a stream is ended, a promise is broken")
            how = await self._end("BrokenPromise", "InternalServerError", str(error))
        except TimeoutError:
            how = self._outbox.closed.name if self._outbox.closed else "SendTimeout"
            reset(self._transport)
        except ConnectionError:
            pass
        except Exception:
            log.exception("a stream failed: position=%s", self._outbox.position)
            name = "InternalServerError"
            how = await self._end(name, name, "see the server's log")
        finally:
            # Whatever came after it was not read: no other request on this connection.
            self.force_close()
            await self._outbox.aclose()
            self._ended(how)

    async def _begin(self) -> None:
        # Any byte that the kernel does not take pauses the writer: backpressure begins at once.
        self._transport.set_write_buffer_limits(high=0)
        self._outbox.on_close = self._hurry
        self._outbox.express = self._express
        opening = encode_opening(retry_ms(self._settings), self._told) + self._news
        self._news = b""
        # By aiohttp: the head of the response goes with it.
        await self.write(opening)
        self._metrics.bytes_delivered += len(opening)

    def _write(self, step: Step) -> None:
        match step:
            case Events(chunks):
                self._write_chunks([chunk for chunk in chunks if chunk.seqs])
            case Silence():
                self._tell_position(otherwise=HEARTBEAT)
            case CaughtUp():
                self._tell_position(otherwise=b"")
            case Outdated(cursor, floor):
                message = f"cursor {cursor} is below the floor: going on from seq {floor}"
                self._send_block(encode_info("OutdatedCursor", message, floor=floor))

    def _write_chunks(self, chunks: list[Chunk]) -> None:
        if not chunks:
            self._break_silence()
            return
        wire = [chunk.wire if self._framed else chunk.data for chunk in chunks]
        self._send(wire[0] if len(wire) == 1 else b"".join(wire))
        self._metrics.events_delivered += sum(map(len, chunks))
        self._told = chunks[-1].seqs[-1]

    def _express(self, chunk: Chunk) -> bool:
        """Write a live chunk from the sequencer's step; say whether the kernel took all of it.

        Everybody waits while this runs for each consumer: what it calls, it calls itself.
        """
        transport = self._transport
        if transport.is_closing():
            return False
        wire = chunk.wire if self._framed else chunk.data
        transport.write(wire)
        seqs = chunk.seqs
        self._told = seqs[-1]
        metrics = self._metrics
        metrics.events_delivered += len(seqs)
        metrics.bytes_delivered += len(wire)
        return not transport.get_write_buffer_size()

    def _break_silence(self) -> None:
        """Write a heartbeat when it is due although events come: the filter hides them all."""
        if self._now() - self._wrote >= self._settings.heartbeat_seconds:
            self._tell_position(otherwise=HEARTBEAT)

    def _tell_position(self, otherwise: bytes) -> None:
        """Write the position when events were hidden since the last write, so that it is kept."""
        if self._outbox.position > self._told:
            self._told = self._outbox.position
            self._send_block(encode_id(self._told))
        elif otherwise:
            self._send_block(otherwise)

    def _send_block(self, block: bytes) -> None:
        self._send(b"%x\r\n%b\r\n" % (len(block), block) if self._framed else block)

    def _send(self, wire: bytes) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client left")
        # Straight to the transport: the chunk carries HTTP's framing already, and aiohttp's own
        # write would copy it once per connection.
        self._transport.write(wire)
        self._wrote = self._now()
        self._metrics.bytes_delivered += len(wire)

    async def _drain(self) -> None:
        """Wait until the kernel has taken everything; raise TimeoutError when it does not."""
        if self._transport.get_write_buffer_size() == 0:
            return
        seconds = self._settings.send_timeout_seconds
        if self._outbox.closed is not None:
            seconds = min(seconds, self._grace_seconds())
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                await self._writer.drain()
        finally:
            self._deadline = None

    def _hurry(self) -> None:
        """The outbox closed: the write that may be stuck gets its grace and no more."""
        # An expiring time-out cannot be moved any more, and need not be.
        if self._deadline is not None and not self._deadline.expired():
            grace = self._now() + self._grace_seconds()
            when = self._deadline.when()
            self._deadline.reschedule(grace if when is None else min(when, grace))

    async def _end(self, how: str, name: str, message: str) -> str:
        """Write the last event, and return how the stream ended: as said, if it could be."""
        try:
            # One bound for all of it; aiohttp's write_eof waits without one of its own.
            async with asyncio.timeout(self._grace_seconds()):
                await self._writer.drain()
                retry = retry_ms(self._settings)
                self._send_block(encode_error(name, message, cursor=self._told, retry_ms=retry))
                await super().write_eof()
                await self._writer.drain()
        except TimeoutError:
            reset(self._transport)
        except ConnectionError:
            return "ClientGone"
        return how

    def _grace_seconds(self) -> float:
        """Return how long the last bytes may wait: when the server stops, others wait for it."""
        grace = self._settings.slow_grace_seconds
        if isinstance(self._outbox.closed, ServerStopping):
            # A write that is stuck now and the last event after it share what draining has.
            return min(grace, self._settings.drain_seconds / 2)
        return grace


def retry_ms(settings: Settings) -> int:
    """Return how long a client shall wait before it reconnects; each gets another time."""
    low, high = settings.retry_min_seconds, settings.retry_max_seconds
    return round(1000 * random.uniform(low, high))  # noqa: S311 - spreads load, keeps no secret
