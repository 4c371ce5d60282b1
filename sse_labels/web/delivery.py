"""The delivery writes what one outbox yields to one socket, encoded by one wire.

Promises: each event reaches the socket once and in order. Only the task of this request writes,
or the sequencer's step while that task waits. A client that does not read is cut off in bounded
time. Every wire has the same delivery, and only the encoding differs.
Does not belong here: which events exist, their encoding, who may read them.
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
    """The encoding of a stream, as bytes for the socket."""

    def events(self, chunk: Chunk) -> bytes:
        """Return all events of a chunk, encoded once for all consumers."""

    def position(self, seq: int) -> bytes:
        """Return bytes that move the client's cursor without an event. Empty: impossible here."""

    def heartbeat(self) -> bytes:
        """Return bytes that keep a silent connection open."""

    def info(
        self, name: str, message: str, *, position: int | None = None, **more: object
    ) -> bytes:
        """Return news about a stream that continues. A `position` moves the client's cursor."""

    def notice(self, notice: Notice) -> bytes:
        """Return the notice of an expired label, encoded once for all consumers."""


class Answer(Protocol):
    """The response whose body a delivery writes."""

    async def begin(self) -> int:
        """Write the bytes before the first event. Return their number."""

    async def finish(self, name: str, message: str) -> None:
        """Write the reason for the end, and the end. The caller bounds the time."""

    def force_close(self) -> None:
        """Close the connection after this answer."""


class Delivery:
    """Writes until the client leaves, the consumer lags or the server stops."""

    __slots__ = (
        "_deadline", "_ended", "_events", "_metrics", "_now", "_outbox", "_settings",
        "_transport", "_wire", "_wrote", "sent_seq", "writer",
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
        """Deliver from cursor `start`. `run` calls `ended` with the reason for the end."""
        self._transport = transport
        #: aiohttp's writer for the same transport, which can wait for its drain. Set before `run`.
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
        #: The client's cursor: the last seq that was sent, with or without an event.
        self.sent_seq = start

    async def run(self, answer: Answer) -> None:
        """Deliver until any end. `answer` begins and finishes the body."""
        how = "ClientGone"
        try:
            # One byte that the kernel does not take pauses the writer: backpressure starts at once.
            self._transport.set_write_buffer_limits(high=0)
            self._outbox.on_close = self._hurry
            self._outbox.express = self._express
            self._metrics.bytes_delivered += await answer.begin()
            await self._drain()
            async for step in self._outbox.events(self.sent_seq):
                self._write(step)
                # While the consumer waits for live events, the last step must not keep its chunks.
                del step
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
            # Input after this request was not read: no other request may use this connection.
            answer.force_close()
            await self._outbox.aclose()
            self._ended(how)

    def send(self, wire: bytes) -> None:
        """Write bytes unchanged. Raises ConnectionResetError when the client has left."""
        if self._transport.is_closing():
            raise ConnectionResetError("the client left")
        # Directly to the transport: the chunk already has its framing, and aiohttp's own write
        # would copy the chunk for each connection.
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
                self._write_caught_up()
            case SnapshotComplete(seq):
                message = f"these labels were in force as of seq {seq}; all later events follow"
                self.send(self._wire.info("SnapshotComplete", message, position=seq, seq=seq))
                self.sent_seq = seq
            case Expired(notices):
                # The position stays the same: a client that resumes from it has missed no label.
                self.send(b"".join(map(self._wire.notice, notices)))
                self._metrics.count["expiries_told"] += len(notices)
            case Outdated(cursor, floor):
                message = f"cursor {cursor} is below the floor: going on from seq {floor}"
                # The event moves the position: a client that resumes does not get it again.
                news = self._wire.info("OutdatedCursor", message, position=floor - 1, floor=floor)
                self.send(news)
                self.sent_seq = floor - 1

    def _write_chunks(self, chunks: list[Chunk]) -> None:
        if not chunks:
            self._break_silence()
            return
        wire = [self._events(chunk) for chunk in chunks]
        self.send(wire[0] if len(wire) == 1 else b"".join(wire))
        self._metrics.events_delivered += sum(map(len, chunks))
        self.sent_seq = chunks[-1].seqs[-1]

    def _express(self, chunk: Chunk) -> bool:
        """Write a live chunk inside the sequencer's step. Return whether the kernel took all of it.

        All streams wait while this runs for each consumer. So `send` is inlined here.
        """
        transport = self._transport
        if transport.is_closing():
            return False
        wire = self._events(chunk)
        transport.write(wire)
        seqs = chunk.seqs
        self.sent_seq = seqs[-1]
        metrics = self._metrics
        metrics.events_delivered += len(seqs)
        metrics.bytes_delivered += len(wire)
        return not transport.get_write_buffer_size()

    def _break_silence(self) -> None:
        """Write a heartbeat if one is due: events come, but the filter hides all of them."""
        if self._now() - self._wrote >= self._settings.heartbeat_seconds:
            self._beat()

    def _write_caught_up(self) -> None:
        """Write the end of history if it is not an event: readers wait for the head they saw."""
        if self._outbox.position > self.sent_seq:
            seq = self.sent_seq = self._outbox.position
            if self._wire.position(seq):
                message = f"this is all up to seq {seq}; what follows is live"
                self.send(self._wire.info("CaughtUp", message, position=seq, seq=seq))

    def _beat(self) -> None:
        """Write a heartbeat, or the position when a filter hid events since the last write.

        Many clients dispatch an empty message for a block without data. So a position that moved
        over unused seqs only is not worth such a block.
        """
        block = b""
        hides = self._outbox.filtered or self._settings.unsigned == "withhold"
        if hides and self._outbox.position > self.sent_seq:
            self.sent_seq = self._outbox.position
            block = self._wire.position(self.sent_seq)
        self.send(block or self._wire.heartbeat())

    async def _drain(self) -> None:
        """Wait until the kernel has taken all bytes. Raises TimeoutError."""
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
        """Shorten the time of a stuck write to its grace, because the outbox closed."""
        # An expired time-out cannot be moved.
        if self._deadline is not None and not self._deadline.expired():
            grace = self._now() + self._grace_seconds()
            when = self._deadline.when()
            self._deadline.reschedule(grace if when is None else min(when, grace))

    async def _end(self, answer: Answer, how: str, name: str, message: str) -> str:
        """Write the last event. Return `how`, or ClientGone when the client has left."""
        try:
            # One time limit for all of it: aiohttp's own ends wait without a limit.
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
        """Return how long the last bytes may wait. A stopping server has less time for them."""
        grace = self._settings.slow_grace_seconds
        if isinstance(self._outbox.closed, ServerStopping):
            # A stuck write and the last event after it share the time for draining.
            return min(grace, self._settings.drain_seconds / 2)
        return grace


def retry_ms(settings: Settings) -> int:
    """Return how long a client waits before it reconnects: a random time for each client."""
    low, high = settings.retry_min_seconds, settings.retry_max_seconds
    return round(1000 * random.uniform(low, high))  # noqa: S311 - spreads load, keeps no secret
