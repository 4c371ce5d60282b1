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
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from sse_labels.backoff import Backoff
from sse_labels.chunk import Chunk
from sse_labels.errors import BrokenPromise, ConsumerTooSlow, DatabaseUnavailable, StreamClosed
from sse_labels.filters import Filter
from sse_labels.metrics import Metrics
from sse_labels.pages import Pages
from sse_labels.sequencer import Sequencer
from sse_labels.store import Page

log = logging.getLogger(__name__)


class Events(NamedTuple):
    """Chunks to write, in order; they continue what was yielded before."""

    chunks: list[Chunk]


class Outdated(NamedTuple):
    """What follows starts at `floor`: events between the cursor and the floor are gone."""

    cursor: int
    floor: int


class CaughtUp(NamedTuple):
    """History is done; what follows is live."""


class Silence(NamedTuple):
    """Nothing to write for `heartbeat_seconds`."""


Step = Events | Outdated | CaughtUp | Silence


class Outbox:
    """One consumer's way from its cursor to live. Not reusable: one `events` per outbox."""

    def __init__(
        self,
        sequencer: Sequencer,
        pages: Pages,
        metrics: Metrics,
        *,
        narrowed: Filter | None,
        page_max_events: int,
        max_events: int,
        heartbeat_seconds: float,
    ) -> None:
        self._sequencer = sequencer
        self._pages = pages
        self._metrics = metrics
        self._narrowed = narrowed
        self._page_max_events = page_max_events
        self._heartbeat_seconds = heartbeat_seconds
        self._queue = ChunkQueue(max_events)
        self._reading: asyncio.Task[Page] | None = None
        self.closed: StreamClosed | None = None
        #: Writes a live chunk at once, in the sequencer's step; says whether all of it is gone.
        #: Used while the consumer waits for the next one and nothing waits for it.
        self.express: Callable[[Chunk], bool] | None = None
        self._parked = False
        self._express_at = 0.0
        #: Called once, when the outbox closes while the stream may be stuck in a write.
        self.on_close: Callable[[], None] | None = None
        #: Every event up to here has been yielded, or hidden by the filter.
        self.position = 0
        self.caught_up = False

    async def events(self, cursor: int) -> AsyncGenerator[Step, None]:
        """Yield what comes after `cursor`, for ever; raise StreamClosed when it has to end."""
        self.position = cursor
        from_ring = True
        try:
            while True:
                # Backfill: from the ring when it reaches back that far, else from the database.
                while (waiting := self._cut_over()) is None:
                    if self._sequencer.ring.covers(self.position):
                        # Others get their turn, also when the filter hides all.
                        await asyncio.sleep(0)
                        ring = self._sequencer.ring
                        if not ring.covers(self.position):
                            continue
                        chunks = [ring.page(self.position, self._page_max_events, self._narrowed)]
                    else:
                        from_ring = False
                        while not await self._page_arrived():
                            yield Silence()
                        page = self._take_page()
                        if page.floor > self.position + 1:
                            yield Outdated(self.position, page.floor)
                        chunks = [page.chunk]
                    yield Events(self._advance(chunks))
                self._metrics.count["ring_hits"] += from_ring
                yield Events(self._advance(waiting))
                yield CaughtUp()
                # Live, until the sequencer says that it cannot continue what it pushed.
                while self.caught_up or not self._queue.empty():
                    live = await self._live()
                    yield Silence() if live is None else Events(self._advance(live))
        finally:
            self._sequencer.unsubscribe(self, self._narrowed)
            if self._reading is not None:
                self._reading.cancel()

    def push(self, chunk: Chunk) -> None:
        """Take a live chunk from the sequencer; when the queue is full, close."""
        if not chunk.seqs and self._queue.empty() and chunk.start <= self.position:
            # The filter hides all of it: the position moves and nobody needs to wake.
            self.position = max(self.position, chunk.end)
            return
        if (
            self._parked
            and self.express is not None
            and chunk.start == self.position
            and self._queue.empty()
        ):
            # Waking the stream's task costs twice what the write does.
            self.position = chunk.end
            self._express_at = asyncio.get_running_loop().time()
            if not self.express(chunk):
                # The task waits until the rest is gone; what comes meanwhile waits in the queue.
                self._queue.wake()
            return
        try:
            self._queue.put_nowait(chunk)
        except asyncio.QueueFull:
            self._metrics.count["queue_overflows"] += 1
            self.close(ConsumerTooSlow(f"more than {self._queue.maxsize} events waited to be read"))

    def fall_back(self) -> None:
        """Read on from the table after what waits; called by the sequencer."""
        self._sequencer.unsubscribe(self, self._narrowed)
        self.caught_up = False
        self._queue.wake()

    def close(self, reason: StreamClosed) -> None:
        """End the stream with `reason`: unsubscribe, free the queue, wake the stream. Only once."""
        if self.closed is not None:
            return
        self.closed = reason
        self._sequencer.unsubscribe(self, self._narrowed)
        self._queue.end()
        if self._reading is not None:
            self._reading.cancel()
        if self.on_close is not None:
            self.on_close()

    def _cut_over(self) -> list[Chunk] | None:
        """Subscribe when the ring holds less than a page to come; return that rest, else None.

        Reading the ring and subscribing happen without an await between: a chunk published
        in between would reach neither. Guarded by
        test_live_event_during_cutover_is_delivered_once.
        """
        if self.closed is not None:
            raise self.closed
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

    def _take_page(self) -> Page:
        """Return the page that arrived; the next one is read while this one is being written."""
        if self.closed is not None:
            raise self.closed
        assert self._reading is not None  # noqa: S101 - `_page_arrived` started it
        page = self._reading.result()
        more = page.full and not self._sequencer.ring.covers(page.chunk.end)
        self._reading = self._read(page.chunk.end) if more else None
        return page

    def _read(self, cursor: int) -> asyncio.Task[Page]:
        return asyncio.create_task(self._read_patiently(cursor), name=f"backfill after {cursor}")

    async def _read_patiently(self, cursor: int) -> Page:
        """Read one page, as often as it takes: the stream outlives its database."""
        backoff = Backoff()
        while True:
            try:
                return await self._pages.read(cursor, self._narrowed)
            except DatabaseUnavailable as error:
                wait = backoff.next()
                log.info("a backfill waits: error=%s next_try_seconds=%.1f", error, wait)
                await asyncio.sleep(wait)

    async def _live(self) -> list[Chunk] | None:
        """Return what waits in the queue, about a page at most; None after a silence."""
        queue = self._queue
        if queue.empty():
            self._parked = True
            try:
                chunks = [await self._next()]
            except TimeoutError:
                return None
            finally:
                self._parked = False
        else:
            chunks = [queue.get_nowait()]
        events = 0
        while not queue.empty() and events < self._page_max_events:
            chunks.append(queue.get_nowait())
            events += len(chunks[-1] or ())
        if self.closed is not None:
            raise self.closed
        return [chunk for chunk in chunks if chunk is not None]

    async def _next(self) -> Chunk | None:
        """Return what comes into the queue; raise TimeoutError after a silence."""
        wait = self._heartbeat_seconds
        while True:
            try:
                async with asyncio.timeout(wait):
                    return await self._queue.get()
            except TimeoutError:
                # What went express broke the silence, and woke nobody.
                wait = (
                    self._express_at + self._heartbeat_seconds - asyncio.get_running_loop().time()
                )
                if wait <= 0:
                    raise

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


class ChunkQueue(asyncio.Queue["Chunk | None"]):
    """An `asyncio.Queue` of chunks whose size and bound are counted in events.

    A put that finds it full raises QueueFull, so it holds less than `maxsize` events plus one
    chunk. A chunk without events counts as one, else they were unbounded. `None` marks the end.
    """

    _queue: deque[Chunk | None]

    def _init(self, maxsize: int) -> None:
        self._queue = deque()
        self._events = 0

    def _put(self, item: Chunk | None) -> None:
        self._queue.append(item)
        self._events += _weight(item)

    def _get(self) -> Chunk | None:
        item = self._queue.popleft()
        self._events -= _weight(item)
        return item

    def qsize(self) -> int:
        """Return the number of events that wait."""
        return self._events

    def wake(self) -> None:
        """Let the reader look up, behind all that waits."""
        if self.empty():
            self.put_nowait(None)

    def end(self) -> None:
        """Free all that waits, and let the reader find the end."""
        self._queue.clear()
        self._events = 0
        self.wake()


def _weight(item: Chunk | None) -> int:
    return max(1, len(item)) if item is not None else 0
