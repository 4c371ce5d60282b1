"""The outbox: one connection's side of the stream, from its cursor on.

Promises: an Outbox yields events through a bounded `asyncio.Queue` per connection, closing the
stream with an error event when the consumer lags. It yields every settled event after the cursor
that matches the filter, once, in order. When the queue is full, the stream ends with
`ConsumerTooSlow`, and the queued chunks are freed at once.

The phases, in order:
1. backfill: a `Backfill` returns history, at the consumer's pace.
2. cutover: the ring holds the rest. The outbox takes the rest and subscribes to the sequencer.
3. live: the sequencer pushes chunks. A chunk that cannot be written at once waits in the queue.
When the sequencer cannot continue the chunks that it pushed, the outbox starts a new backfill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sse_labels.errors import ConsumerTooSlow, StreamClosed
from sse_labels.feed.backfill import Backfill
from sse_labels.feed.chunk import Chunk, after_position
from sse_labels.feed.chunk_queue import ChunkQueue
from sse_labels.feed.expiries import Expiries
from sse_labels.feed.pages import Pages
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.steps import CaughtUp, Events, Expired, Silence, SnapshotComplete, Step
from sse_labels.feed.store import Snapshot
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter


class Outbox:
    """Takes one consumer from its cursor to live. Not reusable: one `events` per outbox.

    Ten thousand consumers wait at a time, most of them for a long time. So a waiting consumer
    costs this object, a future and a timer. The queue exists only while it holds chunks.
    """

    __slots__ = (
        "_backfill", "_client", "_expiries", "_filter", "_heartbeat_seconds", "_loop",
        "_max_events", "_metrics", "_next_step", "_page_max_events", "_pages", "_parked",
        "_queue", "_quiet_since", "_sequencer", "_snapshot", "_timer", "caught_up", "closed",
        "express", "on_close", "position",
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
        """`client` names the reader: clients take turns at reading history.

        With `snapshot`, history is that state, and then the events after that state.

        With `expiries`, the stream also yields their notices once it is live.
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
        #: The first phase; None before it begins and after it ends.
        self._backfill: Backfill | None = None
        #: The step that follows the one yielded last, if it is known already.
        self._next_step: Step | None = None
        #: Live chunks that wait for the consumer; None when there are none.
        self._queue: ChunkQueue | None = None
        #: Wakes the consumer while it waits for live events.
        self._parked: asyncio.Future[bool] | None = None
        self._quiet_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.closed: StreamClosed | None = None
        #: Writes a live chunk at once, in the sequencer's step. Returns whether all of it was
        #: written. Used only while the consumer waits and the queue is empty.
        self.express: Callable[[Chunk], bool] | None = None
        #: Called once, when the outbox closes: the stream may be stuck in a write at that time.
        self.on_close: Callable[[], None] | None = None
        #: Every event up to this seq has been yielded, or the filter hides it.
        self.position = 0
        #: Whether the third phase has begun.
        self.caught_up = False

    def events(self, cursor: int) -> Outbox:
        """Return an endless iterator of the steps after `cursor`. The caller must `aclose` it.

        The iterator raises StreamClosed when the stream has to end.
        """
        self.position = cursor
        if self._expiries is not None:
            self._expiries.begin(self._on_news)
        return self

    def __aiter__(self) -> Outbox:
        return self

    async def __anext__(self) -> Step:
        """Return the next step. Not a generator: a generator would cost each consumer 1 KiB."""
        try:
            while True:
                if self.closed is not None:
                    raise self.closed
                if (step := self._next_queued()) is not None:
                    return step
                step = await (self._live() if self.caught_up else self._history())
                if step is not None:
                    return step
        except BaseException:
            self._leave()
            raise

    async def aclose(self) -> None:
        """End the stream, in any phase."""
        self._leave()

    @property
    def queued(self) -> int:
        """The number of live events and notices that wait for the consumer."""
        queued = 0 if self._queue is None else self._queue.qsize()
        return queued if self._expiries is None else queued + len(self._expiries)

    @property
    def filtered(self) -> bool:
        """Whether a filter or a snapshot hides events from the consumer."""
        return self._filter is not None or self._snapshot is not None

    # The phases.

    async def _history(self) -> Step | None:
        """Return the next step of the backfill, or cut over to live when the backfill is done."""
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
        if self._backfill.is_done():
            return self._cut_over(self._backfill)
        step = await self._backfill.next()
        self.position = self._backfill.position
        if isinstance(step, SnapshotComplete):
            self._snapshot = None
        return step

    def _cut_over(self, backfill: Backfill) -> Step:
        """Take the rest from the ring, and subscribe to the sequencer.

        There is no await between the two: a chunk published in between would be lost.
        Guarded by test_live_event_during_cutover_is_delivered_once.
        """
        rest = [chunk.select(self._filter) for chunk in self._sequencer.ring.after(self.position)]
        self._sequencer.subscribers.add(self, self._filter)
        backfill.close()
        self._backfill = None
        self.caught_up = True
        self._metrics.count["ring_hits"] += backfill.from_ring
        self._next_step = CaughtUp()
        return self._events(rest)

    async def _live(self) -> Step | None:
        """Return notices, or wait until there is something to do."""
        # Notices come only after the queued events: a label must come before its notice.
        if self._expiries is not None and (notices := self._expiries.take(self._page_max_events)):
            return Expired(notices)
        if await self._wait_for_news():
            return Silence()
        if self._queue is None and self.caught_up and self.closed is None:
            # `express` wrote a chunk only in part, and the stream must wait for the rest.
            # Or there are notices, which the next call returns.
            return Events([])
        return None

    def _next_queued(self) -> Step | None:
        """Return the next step that needs no waiting, in any phase; None when there is none."""
        if self._next_step is not None:
            step, self._next_step = self._next_step, None
            return step
        if self._queue is not None:
            if not self._queue.empty():
                return self._events(self._take(self._queue))
            self._queue = None
        return None

    def _events(self, chunks: list[Chunk]) -> Events:
        """Return the step for these chunks, and move the position to their end."""
        chunks = after_position(chunks, self.position)
        if chunks:
            self.position = chunks[-1].end
        return Events(chunks)

    def _take(self, queue: ChunkQueue) -> list[Chunk]:
        """Return chunks of the queue, about one page at most."""
        chunks = [queue.get_nowait()]
        events = 0
        while not queue.empty() and events < self._page_max_events:
            chunks.append(queue.get_nowait())
            events += len(chunks[-1])
        return chunks

    # What the sequencer calls.

    def push(self, chunk: Chunk) -> None:
        """Take a live chunk from the sequencer. Close the stream when the queue is full."""
        if self._queue is None or self._queue.empty():
            if not chunk.seqs and chunk.start <= self.position:
                # The filter hides the whole chunk: the position moves, the consumer sleeps on.
                self.position = max(self.position, chunk.end)
                return
            if (
                self._parked is not None
                and self.express is not None
                and chunk.start == self.position
            ):
                # Waking the stream's task costs twice as much as this write.
                self.position = chunk.end
                self._quiet_since = self._loop.time()
                if not self.express(chunk):
                    # The task waits until the rest is written. Chunks pushed meanwhile are queued.
                    self._wake()
                return
        if self._queue is None:
            self._queue = ChunkQueue(self._max_events)
        try:
            self._queue.put_nowait(chunk)
        except asyncio.QueueFull:
            self._overflow()
        self._on_news()

    def fall_back(self) -> None:
        """Return to the backfill phase once the queued chunks are yielded."""
        self._sequencer.subscribers.remove(self, self._filter)
        self.caught_up = False
        self._wake()

    # The end.

    def close(self, reason: StreamClosed) -> None:
        """End the stream with `reason`: unsubscribe, free the queue, wake the consumer.

        Only the first call has an effect.
        """
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
        """Receive no more chunks and notices, and free the waiting ones."""
        self._sequencer.subscribers.remove(self, self._filter)
        self._queue = None
        if self._expiries is not None:
            self._expiries.leave()

    # Waiting.

    def _on_news(self) -> None:
        """Wake the consumer. Close the stream when too many events and notices wait."""
        if self._expiries is not None and len(self._expiries) and self.queued > self._max_events:
            self._overflow()
        self._wake()

    async def _wait_for_news(self) -> bool:
        """Wait for something to do. Return True when only `heartbeat_seconds` have passed."""
        self._loop = asyncio.get_running_loop()
        self._quiet_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._heartbeat_seconds, self._check_silence)
        parked: asyncio.Future[bool] = self._loop.create_future()
        self._parked = parked
        try:
            return await parked
        finally:
            self._parked = None

    def _wake(self, *, silent: bool = False) -> None:
        """End the consumer's wait, if it waits. Until it waits again, `express` is not used."""
        parked, self._parked = self._parked, None
        if parked is not None and not parked.done():
            parked.set_result(silent)

    def _check_silence(self) -> None:
        """Wake the consumer if nothing was written for `heartbeat_seconds`.

        One timer for the whole stream, not one for each event.
        """
        now = self._loop.time()
        due = self._quiet_since + self._heartbeat_seconds
        if self._parked is None or now >= due:
            self._wake(silent=True)
            due = now + self._heartbeat_seconds
        self._timer = self._loop.call_at(due, self._check_silence)
