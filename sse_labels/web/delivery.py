"""The delivery: what one outbox yields, written to one socket, in the words of one wire.

Promises: each event reaches the socket once and in order, written by nobody but the
one task of this request, or for it while it waits; a client that does not read is cut
in bounded time. The same for every wire: encoding is the only difference.
Does not belong here: which events there are, how they are encoded, who may read them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

from aiohttp.abc import AbstractStreamWriter

from sse_labels.config import Settings
from sse_labels.errors import BrokenPromise, ServerStopping, StreamClosed
from sse_labels.feed.chunk import Chunk
from sse_labels.feed.outbox import Outbox
from sse_labels.feed.steps import (
    CaughtUp,
    Events,
    Expired,
    Outdated,
    Silence,
    SnapshotComplete,
    Step,
)
from sse_labels.metrics import Metrics
from sse_labels.protocol.notice import Notice
from sse_labels.web.door.connection import reset

log = logging.getLogger(__name__)


class Wire(Protocol):
    """How a transport says things: bytes as its socket takes them."""

    def events(self, chunk: Chunk) -> bytes:
        """Return all events of a chunk; encoded once for all who read it."""

    def position(self, seq: int) -> bytes:
        """Return what moves the client's cursor without an event; empty: there is no such thing."""

    def heartbeat(self) -> bytes:
        """Return what keeps a silent connection open."""

    def info(
        self, name: str, message: str, *, position: int | None = None, **more: object
    ) -> bytes:
        """Return news about the stream, which goes on, and move the client's cursor if given."""

    def notice(self, notice: Notice) -> bytes:
        """Return that a label has expired; encoded once for all who are told."""


class Answer(Protocol):
    """The response that a delivery is the body of."""

    async def begin(self) -> int:
        """Write what comes before the first event; return its bytes."""

    async def finish(self, name: str, message: str) -> None:
        """Write why it ends, and the end; the time for it is bounded by the caller."""

    def force_close(self) -> None:
        """Let no other request come on this connection."""


class Delivery:
    """Writes until the client leaves, the consumer lags or the server stops."""

    __slots__ = (
        "_deadline", "_ended", "_events", "_metrics", "_now", "_outbox", "_settings", "_transport",
        "_wire", "_wrote", "told", "writer",
    )  # fmt: skip

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        outbox: Outbox,
        wire: Wire,
        metrics: Metrics,
        settings: Settings,
        *,
        start: int,
        ended: Callable[[str], None],
    ) -> None:
        """Deliver from cursor `start`; `ended` will be called with how `run` ended."""
        self._transport = transport
        #: aiohttp's for the same transport, which knows when that is drained; set before `run`.
        self.writer: AbstractStreamWriter
        self._outbox = outbox
        self._wire = wire
        self._events = wire.events
        self._metrics = metrics
        self._settings = settings
        self._ended = ended
        self._deadline: asyncio.Timeout | None = None
        self._now = asyncio.get_running_loop().time
        self._wrote = self._now()
        #: The last seq that the client was told.
        self.told = start

    async def run(self, answer: Answer) -> None:
        """Deliver to the end, whatever it is; `answer` begins and finishes it."""
        how = "ClientGone"
        try:
            # Any byte that the kernel does not take pauses the writer: backpressure begins at once.
            self._transport.set_write_buffer_limits(high=0)
            self._outbox.on_close = self._hurry
            self._outbox.express = self._express
            self._metrics.bytes_delivered += await answer.begin()
            await self._drain()
            async for step in self._outbox.events(self.told):
                self._write(step)
                await self._drain()
        except StreamClosed as closed:
            how = await self._end(answer, closed.name, closed.name, str(closed))
        except BrokenPromise as error:
            self._metrics.count["broken_promises"] += 1
            log.exception("a stream is ended, a promise is broken")
            how = await self._end(answer, "BrokenPromise", "InternalServerError", str(error))
        except TimeoutError:
            how = self._outbox.closed.name if self._outbox.closed else "SendTimeout"
            reset(self._transport)
        except ConnectionError:
            pass
        except Exception:
            log.exception("a stream failed", extra={"position": self._outbox.position})
            name = "InternalServerError"
            how = await self._end(answer, name, name, "see the server's log")
        finally:
            # Whatever came after it was not read: no other request on this connection.
            answer.force_close()
            await self._outbox.aclose()
            self._ended(how)

    def send(self, wire: bytes) -> None:
        """Write bytes as they are; raise ConnectionResetError when the client has left."""
        if self._transport.is_closing():
            raise ConnectionResetError("the client left")
        # Straight to the transport: the chunk carries its framing already, and aiohttp's own
        # write would copy it once per connection.
        self._transport.write(wire)
        self._wrote = self._now()
        self._metrics.bytes_delivered += len(wire)

    def _write(self, step: Step) -> None:
        match step:
            case Events(chunks):
                self._write_chunks([chunk for chunk in chunks if chunk.seqs])
            case Silence():
                self._beat()
            case CaughtUp():
                self._tell_end_of_history()
            case SnapshotComplete(seq):
                message = f"this was in force as of seq {seq}; all that comes after it follows"
                self.send(self._wire.info("SnapshotComplete", message, position=seq, seq=seq))
                self.told = seq
            case Expired(notices):
                # The position stays: a client that comes back with it has missed no label.
                self.send(b"".join(map(self._wire.notice, notices)))
                self._metrics.count["expiries_told"] += len(notices)
            case Outdated(cursor, floor):
                message = f"cursor {cursor} is below the floor: going on from seq {floor}"
                # The position moves with it: a client that comes back is not told again.
                news = self._wire.info("OutdatedCursor", message, position=floor - 1, floor=floor)
                self.send(news)
                self.told = floor - 1

    def _write_chunks(self, chunks: list[Chunk]) -> None:
        if not chunks:
            self._break_silence()
            return
        wire = [self._events(chunk) for chunk in chunks]
        self.send(wire[0] if len(wire) == 1 else b"".join(wire))
        self._metrics.events_delivered += sum(map(len, chunks))
        self.told = chunks[-1].seqs[-1]

    def _express(self, chunk: Chunk) -> bool:
        """Write a live chunk from the sequencer's step; say whether the kernel took all of it.

        Everybody waits while this runs for each consumer: what it calls, it calls itself.
        """
        transport = self._transport
        if transport.is_closing():
            return False
        wire = self._events(chunk)
        transport.write(wire)
        seqs = chunk.seqs
        self.told = seqs[-1]
        metrics = self._metrics
        metrics.events_delivered += len(seqs)
        metrics.bytes_delivered += len(wire)
        return not transport.get_write_buffer_size()

    def _break_silence(self) -> None:
        """Write a heartbeat when it is due although events come: the filter hides them all."""
        if self._now() - self._wrote >= self._settings.heartbeat_seconds:
            self._beat()

    def _tell_end_of_history(self) -> None:
        """Say where history ends when it is not at an event: readers wait for the head they saw."""
        if self._outbox.position > self.told:
            seq = self.told = self._outbox.position
            if self._wire.position(seq):
                message = f"this is all up to seq {seq}; what follows is live"
                self.send(self._wire.info("CaughtUp", message, position=seq, seq=seq))

    def _beat(self) -> None:
        """Write a heartbeat: the position when a filter hid events since the last write.

        Only then: many clients hand out an empty message for a block without data, and of a
        position that moved over unused seqs alone there is nothing to keep.
        """
        block = b""
        hides = self._outbox.filtered or self._settings.unsigned == "withhold"
        if hides and self._outbox.position > self.told:
            self.told = self._outbox.position
            block = self._wire.position(self.told)
        self.send(block or self._wire.heartbeat())

    async def _drain(self) -> None:
        """Wait until the kernel has taken everything; raise TimeoutError when it does not."""
        if self._transport.get_write_buffer_size() == 0:
            return
        seconds = self._settings.send_timeout_seconds
        if self._outbox.closed is not None:
            seconds = min(seconds, self._grace_seconds())
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                await self.writer.drain()
        finally:
            self._deadline = None

    def _hurry(self) -> None:
        """The outbox closed: the write that may be stuck gets its grace and no more."""
        # An expiring time-out cannot be moved any more, and need not be.
        if self._deadline is not None and not self._deadline.expired():
            grace = self._now() + self._grace_seconds()
            when = self._deadline.when()
            self._deadline.reschedule(grace if when is None else min(when, grace))

    async def _end(self, answer: Answer, how: str, name: str, message: str) -> str:
        """Write the last event, and return how the stream ended: as said, if it could be."""
        try:
            # One bound for all of it; aiohttp's own ends wait without one.
            async with asyncio.timeout(self._grace_seconds()):
                await self.writer.drain()
                await answer.finish(name, message)
                await self.writer.drain()
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
