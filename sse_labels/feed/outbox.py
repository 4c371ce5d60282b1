"""The outbox: one connection's side of the stream, from its cursor on.

Promises: an Outbox yields events through a bounded `asyncio.Queue` per connection: every settled
event after the cursor that the filter lets through, once, in order. It closes the stream with an
error event when the consumer lags: whoever lets the queue fill up is told `ConsumerTooSlow`, and
what waited is freed at that moment.

The phases, in order:
1. backfill: a `Backfill` returns history, at the consumer's pace.
2. cutover: the ring holds what is left. The outbox takes it and subscribes to the sequencer.
3. live: the sequencer pushes chunks; what does not go out at once waits in the queue.
When the sequencer cannot continue what it pushed, the outbox falls back to a new backfill.

Does not belong here: bytes, sockets, HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from sse_labels.errors import ConsumerTooSlow, StreamClosed
from sse_labels.feed.backfill import Backfill
from sse_labels.feed.chunk import Chunk, after_position
from sse_labels.feed.chunk_queue import ChunkQueue
from sse_labels.feed.pages import Pages
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.steps import CaughtUp, Events, Expired, Silence, SnapshotComplete, Step
from sse_labels.feed.store import Snapshot
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.notice import Notice


class Expiries(Protocol):
    """What tells one stream of labels that expire; its length is how many notices wait."""

    def begin(self, on_news: Callable[[], None]) -> None:
        """Tell from now on; call `on_news` whenever `take` may return more."""

    def take(self, most: int) -> list[Notice]:
        """Return at most `most` of the notices that wait, in order."""

    def leave(self) -> None:
        """Tell nothing more."""

    def __len__(self) -> int:
        """Return how many notices wait."""


class Outbox:
    """One consumer's way from its cursor to live. Not reusable: one `events` per outbox.

    Ten thousand consumers wait at a time, most of them for long: one that waits is this
    object, a future and a timer. A queue it has while something waits in it.
    """

    __slots__ = (
        "_backfill",
        "_behind",
        "_client",
        "_expiries",
        "_filter",
        "_heartbeat_seconds",
        "_loop",
        "_max_events",
        "_metrics",
        "_page_max_events",
        "_pages",
        "_parked",
        "_queue",
        "_quiet_since",
        "_sequencer",
        "_snapshot",
        "_timer",
        "caught_up",
        "closed",
        "express",
        "on_close",
        "position",
    )  # fmt: skip

    def __init__(
        self,
        sequencer: Sequencer,
        pages: Pages,
        metrics: Metrics,
        *,
        client: str,
        filter: Filter | None,
        page_max_events: int,
        max_events: int,
        heartbeat_seconds: float,
        snapshot: Snapshot | None = None,
        expiries: Expiries | None = None,
    ) -> None:
        """`client` is who reads: reads of history are shared by turns among clients.

        With `snapshot` history is that state, and then the events after it.

        With `expiries` what they tell is told once the stream is live.
        """
        self._sequencer = sequencer
        self._pages = pages
        self._metrics = metrics
        self._client = client
        self._filter = filter
        self._page_max_events = page_max_events
        self._max_events = max_events
        self._heartbeat_seconds = heartbeat_seconds
        self._snapshot = snapshot
        self._expiries = expiries
        #: The first phase; None when it is over, or has not begun.
        self._backfill: Backfill | None = None
        #: A step that belongs behind the one that was yielded.
        self._behind: Step | None = None
        #: Live chunks that wait for the consumer; None when there are none.
        self._queue: ChunkQueue | None = None
        #: What the consumer waits for, while it waits for live events.
        self._parked: asyncio.Future[bool] | None = None
        self._quiet_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.closed: StreamClosed | None = None
        #: Writes a live chunk at once, in the sequencer's step; says whether all of it is gone.
        #: Used while the consumer waits for the next one and nothing waits for it.
        self.express: Callable[[Chunk], bool] | None = None
        #: Called once, when the outbox closes while the stream may be stuck in a write.
        self.on_close: Callable[[], None] | None = None
        #: Every event up to here has been yielded, or hidden by the filter.
        self.position = 0
        #: Whether the third phase has begun.
        self.caught_up = False

    def events(self, cursor: int) -> Outbox:
        """Return what yields all that comes after `cursor`, for ever; to be closed by `aclose`.

        Raises StreamClosed when it has to end.
        """
        self.position = cursor
        if self._expiries is not None:
            self._expiries.begin(self._hear)
        return self

    def __aiter__(self) -> Outbox:
        return self

    async def __anext__(self) -> Step:
        """Return the next step. Not a generator: it would cost each consumer 1 KiB."""
        try:
            while True:
                if self.closed is not None:
                    raise self.closed
                if (step := self._waiting()) is not None:
                    return step
                step = await (self._live() if self.caught_up else self._history())
                if step is not None:
                    return step
        except BaseException:
            self._leave()
            raise

    async def aclose(self) -> None:
        """Leave, from wherever it is."""
        self._leave()

    @property
    def queued(self) -> int:
        """How many live events, and expiries, wait for the consumer."""
        queued = 0 if self._queue is None else self._queue.qsize()
        return queued if self._expiries is None else queued + len(self._expiries)

    @property
    def filtered(self) -> bool:
        """Whether events are hidden from the consumer: by a filter, or as no part of a state."""
        return self._filter is not None or self._snapshot is not None

    # The phases.

    async def _history(self) -> Step | None:
        """Return the next step of the backfill, or cut over to live when it is over."""
        if self._backfill is None:
            self._backfill = Backfill(
                self._sequencer,
                self._pages,
                self.position,
                client=self._client,
                filter=self._filter,
                snapshot=self._snapshot,
                page_max_events=self._page_max_events,
                heartbeat_seconds=self._heartbeat_seconds,
            )
        if self._backfill.is_over():
            return self._cut_over(self._backfill)
        step = await self._backfill.next()
        self.position = self._backfill.position
        if isinstance(step, SnapshotComplete):
            self._snapshot = None
        return step

    def _cut_over(self, backfill: Backfill) -> Step:
        """Take from the ring what is left, and subscribe.

        Both happen without an await between: a chunk published in between would reach neither.
        Guarded by test_live_event_during_cutover_is_delivered_once.
        """
        rest = [chunk.select(self._filter) for chunk in self._sequencer.ring.after(self.position)]
        self._sequencer.subscribe(self, self._filter)
        backfill.close()
        self._backfill = None
        self.caught_up = True
        self._metrics.count["ring_hits"] += backfill.from_ring
        self._behind = CaughtUp()
        return self._events(rest)

    async def _live(self) -> Step | None:
        """Return expiries, or wait until something is to be done."""
        # What expires is told when nothing waits: the label itself has come before.
        if self._expiries is not None and (told := self._expiries.take(self._page_max_events)):
            return Expired(told)
        if await self._silence():
            return Silence()
        if self._queue is None and self.caught_up and self.closed is None:
            # What went express did not go whole: the stream is to wait for the rest.
            # Or there are expiries, which are looked for then.
            return Events([])
        return None

    def _waiting(self) -> Step | None:
        """Return what waits already, whatever the phase."""
        if self._behind is not None:
            step, self._behind = self._behind, None
            return step
        if self._queue is not None:
            if not self._queue.empty():
                return self._events(self._take(self._queue))
            self._queue = None
        return None

    def _events(self, chunks: list[Chunk]) -> Events:
        """Move the position over these chunks."""
        chunks = after_position(chunks, self.position)
        if chunks:
            self.position = chunks[-1].end
        return Events(chunks)

    def _take(self, queue: ChunkQueue) -> list[Chunk]:
        """Return what waits in the queue, about a page at most."""
        chunks = [queue.get_nowait()]
        events = 0
        while not queue.empty() and events < self._page_max_events:
            chunks.append(queue.get_nowait())
            events += len(chunks[-1])
        return chunks

    # What the sequencer calls.

    def push(self, chunk: Chunk) -> None:
        """Take a live chunk from the sequencer; when the queue is full, close."""
        if self._queue is None or self._queue.empty():
            if not chunk.seqs and chunk.start <= self.position:
                # The filter hides all of it: the position moves and nobody needs to wake.
                self.position = max(self.position, chunk.end)
                return
            if (
                self._parked is not None
                and self.express is not None
                and chunk.start == self.position
            ):
                # Waking the stream's task costs twice what the write does.
                self.position = chunk.end
                self._quiet_since = self._loop.time()
                if not self.express(chunk):
                    # The task waits until the rest is gone; what comes meanwhile is queued.
                    self._wake()
                return
        if self._queue is None:
            self._queue = ChunkQueue(self._max_events)
        try:
            self._queue.put_nowait(chunk)
        except asyncio.QueueFull:
            self._overflow()
        self._hear()

    def fall_back(self) -> None:
        """Read on from the table after what waits; called by the sequencer."""
        self._sequencer.unsubscribe(self, self._filter)
        self.caught_up = False
        self._wake()

    # The end.

    def close(self, reason: StreamClosed) -> None:
        """End the stream with `reason`: unsubscribe, free the queue, wake the stream. Only once."""
        if self.closed is not None:
            return
        self.closed = reason
        self._unsubscribe()
        self._wake()
        if self._backfill is not None:
            self._backfill.close()
        if self.on_close is not None:
            self.on_close()

    def _overflow(self) -> None:
        if self.closed is None:
            self._metrics.count["queue_overflows"] += 1
            self.close(ConsumerTooSlow(f"more than {self._max_events} events waited to be read"))

    def _leave(self) -> None:
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._backfill is not None:
            self._backfill.close()

    def _unsubscribe(self) -> None:
        """Receive nothing more, and free what waits."""
        self._sequencer.unsubscribe(self, self._filter)
        self._queue = None
        if self._expiries is not None:
            self._expiries.leave()

    # Waiting.

    def _hear(self) -> None:
        """See that there is something to do; when events and expiries are too many, close."""
        if self._expiries is not None and len(self._expiries) and self.queued > self._max_events:
            self._overflow()
        self._wake()

    async def _silence(self) -> bool:
        """Wait for something to do; return whether it is only that all was quiet for long."""
        self._loop = asyncio.get_running_loop()
        self._quiet_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._heartbeat_seconds, self._look_up)
        parked: asyncio.Future[bool] = self._loop.create_future()
        self._parked = parked
        try:
            return await parked
        finally:
            self._parked = None

    def _wake(self, *, silent: bool = False) -> None:
        """Let the consumer look up, if it waits. From here on it does not: no more express."""
        parked, self._parked = self._parked, None
        if parked is not None and not parked.done():
            parked.set_result(silent)

    def _look_up(self) -> None:
        """See whether all was quiet for `heartbeat_seconds`: one timer, not one for each event."""
        now = self._loop.time()
        due = self._quiet_since + self._heartbeat_seconds
        if self._parked is None or now >= due:
            self._wake(silent=True)
            due = now + self._heartbeat_seconds
        self._timer = self._loop.call_at(due, self._look_up)
