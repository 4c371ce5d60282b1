"""The outbox: one connection's side of the stream, from its cursor on.

Promises: `events(cursor)` yields every settled event after the cursor that the
filter lets through, once, in order; history at the consumer's pace, then live
from a bounded queue. A consumer that lets the queue fill up is told
`ConsumerTooSlow`, and what waited for it is freed at that moment.
Stands in the corridor between the sequencer, to which it subscribes, and the
stream, which writes what it yields.
Does not belong here: bytes, sockets, HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from sse_labels.backoff import Backoff
from sse_labels.chunk import Chunk, merge
from sse_labels.errors import (
    BrokenPromise,
    ConsumerTooSlow,
    DatabaseRefused,
    DatabaseUnavailable,
    HistoryRefused,
    StreamClosed,
)
from sse_labels.expiry_reader import ExpiryReader
from sse_labels.filters import Filter
from sse_labels.metrics import Metrics
from sse_labels.notice import Notice
from sse_labels.pages import Pages
from sse_labels.sequencer import Sequencer
from sse_labels.store import Page, Snapshot

log = logging.getLogger(__name__)


class Events(NamedTuple):
    """Chunks to write, in order; they continue what was yielded before."""

    chunks: list[Chunk]


class Outdated(NamedTuple):
    """What follows starts at `floor`: events between the cursor and that seq are gone."""

    cursor: int
    floor: int


class CaughtUp(NamedTuple):
    """History is done; what follows is live."""


class SnapshotComplete(NamedTuple):
    """What was in force as of `seq` has been yielded; what follows are all events after it."""

    seq: int


class Expired(NamedTuple):
    """Labels that have expired, in order; each of them came before, or will not come."""

    notices: list[Notice]


class Silence(NamedTuple):
    """Nothing to write for `heartbeat_seconds`."""


Step = Events | Outdated | CaughtUp | SnapshotComplete | Expired | Silence


class Outbox:
    """One consumer's way from its cursor to live. Not reusable: one `events` per outbox.

    Ten thousand consumers wait at a time, most of them for long: one that waits is this
    object, a future and a timer. A queue it has while something waits in it.
    """

    __slots__ = (
        "_client", "_expiries", "_from_ring", "_heartbeat_seconds", "_loop", "_max_events",
        "_metrics", "_narrowed", "_next", "_page_max_events", "_pages", "_parked", "_queue",
        "_quiet_since", "_reading", "_sequencer", "_snapshot", "_timer", "caught_up", "closed",
        "express", "on_close", "position",
    )  # fmt: skip

    def __init__(
        self,
        sequencer: Sequencer,
        pages: Pages,
        metrics: Metrics,
        *,
        client: str,
        narrowed: Filter | None,
        page_max_events: int,
        max_events: int,
        heartbeat_seconds: float,
        snapshot: Snapshot | None = None,
        expiries: ExpiryReader | None = None,
    ) -> None:
        """`client` is who reads: reads of history are shared by turns among clients.

        With `snapshot` history is that state, and then the events after it.

        With `expiries` what they tell is told once the stream is live.
        """
        self._sequencer = sequencer
        self._snapshot = snapshot
        self._expiries = expiries
        self._pages = pages
        self._metrics = metrics
        self._client = client
        self._narrowed = narrowed
        self._page_max_events = page_max_events
        self._max_events = max_events
        self._heartbeat_seconds = heartbeat_seconds
        #: A step that belongs behind the one that was yielded; its events are yet to be advanced.
        self._next: Step | None = None
        #: Live chunks that wait for the consumer; None when there are none.
        self._queue: ChunkQueue | None = None
        #: What the consumer waits for, while it waits for live events.
        self._parked: asyncio.Future[bool] | None = None
        self._quiet_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[Page] | None = None
        self._from_ring = True
        self.closed: StreamClosed | None = None
        #: Writes a live chunk at once, in the sequencer's step; says whether all of it is gone.
        #: Used while the consumer waits for the next one and nothing waits for it.
        self.express: Callable[[Chunk], bool] | None = None
        #: Called once, when the outbox closes while the stream may be stuck in a write.
        self.on_close: Callable[[], None] | None = None
        #: Every event up to here has been yielded, or hidden by the filter.
        self.position = 0
        self.caught_up = False

    def events(self, cursor: int) -> Outbox:
        """Return what yields all that comes after `cursor`, for ever; to be closed by `aclose`.

        Raises StreamClosed when it has to end.
        """
        self.position = cursor
        if self._expiries is not None:
            self._expiries.begin(self._hear)
        return self

    @property
    def queued(self) -> int:
        """How many live events, and expiries, wait for the consumer."""
        queued = 0 if self._queue is None else self._queue.qsize()
        return queued if self._expiries is None else queued + len(self._expiries)

    @property
    def filtered(self) -> bool:
        """Whether events are hidden from the consumer: by a filter, or as no part of a state."""
        return self._narrowed is not None or self._snapshot is not None

    def __aiter__(self) -> Outbox:
        return self

    async def __anext__(self) -> Step:
        """Return the next step. Not a generator: it would cost each consumer 1 KiB."""
        try:
            while True:
                if self.closed is not None:
                    raise self.closed
                if self._next is not None:
                    step, self._next = self._next, None
                    return Events(self._advance(step.chunks)) if isinstance(step, Events) else step
                if self._queue is not None:
                    if not self._queue.empty():
                        return Events(self._advance(self._take(self._queue)))
                    self._queue = None
                if self.caught_up:
                    # Live, until the sequencer says that it cannot continue what it pushed. What
                    # expires is told when nothing waits: the label itself has come before.
                    if self._expiries is not None and (
                        told := self._expiries.take(self._page_max_events)
                    ):
                        return Expired(told)
                    if await self._silence():
                        return Silence()
                    if self._queue is None and self.caught_up and self.closed is None:
                        # What went express did not go whole: the stream is to wait for the rest.
                        # Or there are expiries, which are looked for then.
                        return Events([])
                elif (found := await self._backfill()) is not None:
                    return found
        except BaseException:
            self._leave()
            raise

    async def aclose(self) -> None:
        """Leave, from wherever it is."""
        self._leave()

    def _leave(self) -> None:
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reading is not None:
            self._reading.cancel()

    def _unsubscribe(self) -> None:
        """Receive nothing more, and free what waits."""
        self._sequencer.unsubscribe(self, self._narrowed)
        self._queue = None
        if self._expiries is not None:
            self._expiries.leave()

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

    def _hear(self) -> None:
        """See that there is something to do; when events and expiries are too many, close."""
        if self._expiries is not None and len(self._expiries) and self.queued > self._max_events:
            self._overflow()
        self._wake()

    def _overflow(self) -> None:
        if self.closed is None:
            self._metrics.count["queue_overflows"] += 1
            self.close(ConsumerTooSlow(f"more than {self._max_events} events waited to be read"))

    def fall_back(self) -> None:
        """Read on from the table after what waits; called by the sequencer."""
        self._sequencer.unsubscribe(self, self._narrowed)
        self.caught_up = False
        self._wake()

    def close(self, reason: StreamClosed) -> None:
        """End the stream with `reason`: unsubscribe, free the queue, wake the stream. Only once."""
        if self.closed is not None:
            return
        self.closed = reason
        self._unsubscribe()
        self._wake()
        if self._reading is not None:
            self._reading.cancel()
        if self.on_close is not None:
            self.on_close()

    def _take(self, queue: ChunkQueue) -> list[Chunk]:
        """Return what waits in the queue, about a page at most."""
        chunks = [queue.get_nowait()]
        events = 0
        while not queue.empty() and events < self._page_max_events:
            chunks.append(queue.get_nowait())
            events += len(chunks[-1])
        return chunks

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

    async def _backfill(self) -> Step | None:
        """Return the next step of history: from the ring if it reaches back so far, or a page.

        Returns None when others had their turn and one should look again.
        """
        outdated = self._skip_what_is_gone()
        if outdated is not None:
            return outdated
        if self._snapshot is not None:
            return await self._fold(self._snapshot)
        waiting = self._cut_over()
        if waiting is not None:
            self._metrics.count["ring_hits"] += self._from_ring
            self._next = CaughtUp()
            return Events(self._advance(waiting))
        if self._sequencer.ring.covers(self.position):
            # Others get their turn, also when the filter hides all.
            cut = partial(self._cut, self.position)
            page = await self._pages.turn(self._client, (self.position, self._narrowed), cut)
            return None if page is None else Events(self._advance([page]))
        return await self._page()

    def _cut(self, cursor: int) -> Chunk | None:
        """Return the page of the ring after `cursor`, None when it reaches no longer so far."""
        ring = self._sequencer.ring
        if not ring.covers(cursor):
            return None
        return ring.page(cursor, self._page_max_events, self._narrowed)

    async def _fold(self, snapshot: Snapshot) -> Step:
        """Return the next step of a snapshot: from the database, whatever the ring holds."""
        if self.position < snapshot.until:
            return await self._page()
        self._snapshot = None
        return SnapshotComplete(self.position)

    async def _page(self) -> Step:
        """Return the next page, or Silence while it takes long."""
        self._from_ring = False
        if not await self._page_arrived():
            return Silence()
        if self.closed is not None:
            raise self.closed
        assert self._reading is not None  # noqa: S101 - `_page_arrived` started it
        page, self._reading = self._reading.result(), None
        # The floor may have risen since it was asked for; what is below it is cut off then.
        outdated = self._skip_what_is_gone()
        self._read_ahead(page)
        if outdated is not None:
            self._next = Events([page.chunk])
            return outdated
        return Events(self._advance([page.chunk]))

    def _skip_what_is_gone(self) -> Outdated | None:
        """Go on from the floor when the position is below it; return what to say, if anything."""
        cursor, floor = self.position, self._sequencer.floor
        if cursor + 1 >= floor:
            return None
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._snapshot is not None and not self._snapshot.resumed:
            # What a new consumer does not get is not missing.
            self.position = min(floor - 1, self._snapshot.until)
            return None
        self.position = self._sequencer.oldest - 1
        return Outdated(cursor, self._sequencer.oldest)

    def _cut_over(self) -> list[Chunk] | None:
        """Subscribe when the ring holds less than a page to come; return that rest, else None.

        Reading the ring and subscribing happen without an await between: a chunk published
        in between would reach neither. Guarded by
        test_live_event_during_cutover_is_delivered_once.
        """
        ring = self._sequencer.ring
        if not ring.covers(self.position):
            return None
        if ring.count_after(self.position, self._page_max_events) > self._page_max_events:
            return None
        waiting = [chunk.select(self._narrowed) for chunk in ring.after(self.position)]
        self._sequencer.subscribe(self, self._narrowed)
        self.caught_up = True
        return waiting

    async def _page_arrived(self) -> bool:
        """Wait for the next page from the database, at most for `heartbeat_seconds`."""
        if self._reading is None:
            self._reading = self._read(self.position)
        await asyncio.wait({self._reading}, timeout=self._heartbeat_seconds)
        return self._reading.done()

    def _read_ahead(self, page: Page) -> None:
        """Read the next page while this one is being written."""
        cursor = max(page.chunk.end, self.position)
        if self._snapshot is None:
            more = page.full and not self._sequencer.ring.covers(cursor)
        else:
            more = page.full and cursor < self._snapshot.until
        if more:
            self._reading = self._read(cursor)

    def _read(self, cursor: int) -> asyncio.Task[Page]:
        task = asyncio.create_task(self._read_patiently(cursor), name=f"backfill after {cursor}")
        # When it fails the consumer may be gone; then nobody else would look at the error.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _read_patiently(self, cursor: int) -> Page:
        """Read one page, as often as it takes: the stream outlives its database."""
        backoff = Backoff()
        while True:
            try:
                page = await self._pages.read(self._client, cursor, self._narrowed, self._snapshot)
                if page.floor > self._sequencer.floor:
                    await self._sequencer.look_at_state()
            except DatabaseRefused as error:
                # Each of 15,000 streams may cause such a line: they are limited together.
                log.error("a backfill is refused", extra={"error": error, "caused_by": "backfills"})
                raise HistoryRefused from error
            except DatabaseUnavailable as error:
                wait = backoff.next()
                log.info(
                    "a backfill waits",
                    extra={"error": error, "next_try_seconds": wait, "caused_by": "backfills"},
                )
                await asyncio.sleep(wait)
            else:
                return page

    def _advance(self, chunks: list[Chunk]) -> list[Chunk]:
        """Move the position over `chunks`; drop what lies before it (the cursor was ahead)."""
        kept = []
        for chunk in chunks:
            if chunk.end <= self.position:
                continue
            if chunk.start > self.position:
                raise BrokenPromise(f"{chunk!r} does not continue position {self.position}")
            if chunk.start < self.position:
                chunk = chunk.after(self.position)
            self.position = chunk.end
            kept.append(chunk)
        return kept


class ChunkQueue(asyncio.Queue[Chunk]):
    """An `asyncio.Queue` of chunks whose size and bound are counted in events.

    A put that finds it full raises QueueFull, so it holds less than `maxsize` events plus one
    chunk. Chunks without events become one, else a filter that hides all made them unbounded.
    """

    _queue: deque[Chunk]

    def _init(self, maxsize: int) -> None:
        self._queue = deque()
        self._events = 0

    def _put(self, item: Chunk) -> None:
        if not item.seqs and self._queue:
            last = self._queue[-1]
            if not last.seqs and last.end == item.start:
                item = merge([self._queue.pop(), item])
        self._queue.append(item)
        self._events += len(item)

    def _get(self) -> Chunk:
        item = self._queue.popleft()
        self._events -= len(item)
        return item

    def qsize(self) -> int:
        """Return the number of events that wait."""
        return self._events
