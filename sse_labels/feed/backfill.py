"""The backfill: takes one consumer through history, from its cursor to the ring.

Promises: `next` returns every settled event after the position that matches the filter, once, in
order, at the consumer's pace. Events come from the ring if the ring still has them, else from pages
of the table. One page is read ahead. With a snapshot, the state comes first. While the database is
away, the backfill waits. It is done when the ring holds the rest, and the rest is one page at most.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from sse_labels.backoff import Backoff
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable, HistoryRefused
from sse_labels.feed.chunk import Chunk, after_position
from sse_labels.feed.pages import Pages
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.steps import Events, Outdated, Silence, SnapshotComplete, Step
from sse_labels.feed.store import Page, Snapshot
from sse_labels.protocol.filters import Filter

log = logging.getLogger(__name__)


class Backfill:
    """Reads history for one consumer. The caller must `close` it."""

    __slots__ = (
        "_client", "_filter", "_heartbeat_seconds", "_next_chunk", "_page_max_events", "_pages",
        "_reading", "_sequencer", "_snapshot", "from_ring", "position",
    )  # fmt: skip

    def __init__(
        self,
        sequencer: Sequencer,
        pages: Pages,
        position: int,
        *,
        client: str,
        filter: Filter | None,
        snapshot: Snapshot | None,
        page_max_events: int,
        heartbeat_seconds: float,
    ) -> None:
        """`client` names the reader: clients take turns at reading history."""
        self._sequencer = sequencer
        self._pages = pages
        self._client = client
        self._filter = filter
        self._snapshot = snapshot
        self._page_max_events = page_max_events
        self._heartbeat_seconds = heartbeat_seconds
        #: The next page, while it is being read.
        self._reading: asyncio.Task[Page] | None = None
        #: A page that was read already, and follows the step that was returned.
        self._next_chunk: Chunk | None = None
        #: Every event up to this seq was returned, or the filter hides it.
        self.position = position
        #: Whether all events came from the ring so far.
        self.from_ring = True

    def is_done(self) -> bool:
        """Return whether the ring holds the rest, and the rest is one page at most."""
        ring, most = self._sequencer.ring, self._page_max_events
        return (
            self._snapshot is None
            and self._next_chunk is None
            and self.position + 1 >= self._sequencer.floor
            and ring.covers(self.position)
            and ring.count_after(self.position, most) <= most
        )

    async def next(self) -> Step | None:
        """Return the next step, or None: then the caller must ask `is_done` again.

        Raises HistoryRefused.
        """
        if self._next_chunk is not None:
            chunk, self._next_chunk = self._next_chunk, None
            return self._events(chunk)
        if (outdated := self._skip_deleted()) is not None:
            return outdated
        if self._snapshot is not None:
            if self.position >= self._snapshot.until:
                self._snapshot = None
                return SnapshotComplete(self.position)
        elif self._sequencer.ring.covers(self.position):
            # Even if the filter hides every event, the other clients must get their turn.
            ring_page = partial(self._ring_page, self.position)
            page = await self._pages.turn(self._client, (self.position, self._filter), ring_page)
            return None if page is None else self._events(page)
        return await self._page()

    def close(self) -> None:
        """Cancel the read in progress; a `next` that waits for it then returns None."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()

    def _events(self, chunk: Chunk) -> Events:
        chunks = after_position([chunk], self.position)
        if chunks:
            self.position = chunks[-1].end
        return Events(chunks)

    def _ring_page(self, cursor: int) -> Chunk | None:
        """Return the ring's page after `cursor`, None when the ring no longer covers `cursor`."""
        ring = self._sequencer.ring
        if not ring.covers(cursor):
            return None
        return ring.page(cursor, self._page_max_events, self._filter)

    def _skip_deleted(self) -> Outdated | None:
        """Move a position below the floor up to the floor.

        Returns the step that reports deleted events; None when there is nothing to report.
        """
        cursor, floor = self.position, self._sequencer.floor
        if cursor + 1 >= floor:
            return None
        self.close()
        if self._snapshot is not None and not self._snapshot.resumed:
            # A new consumer misses nothing: the state does not contain deleted labels.
            self.position = min(floor - 1, self._snapshot.until)
            return None
        self.position = self._sequencer.oldest - 1
        return Outdated(cursor, self._sequencer.oldest)

    async def _page(self) -> Step | None:
        """Return the next page of the table, or Silence when the read takes too long."""
        self.from_ring = False
        reading = self._reading
        if reading is None:
            reading = self._reading = self._read(self.position)
        await asyncio.wait({reading}, timeout=self._heartbeat_seconds)
        if self._reading is not reading:
            # The backfill was closed during the wait.
            return None
        if not reading.done():
            return Silence()
        self._reading = None
        page = reading.result()
        # The floor may have risen during the read. Then the events below the floor are cut off.
        outdated = self._skip_deleted()
        self._read_ahead(page)
        if outdated is None:
            return self._events(page.chunk)
        self._next_chunk = page.chunk
        return outdated

    def _read_ahead(self, page: Page) -> None:
        """Start reading the page after `page`, while `page` is being written."""
        cursor = max(page.chunk.end, self.position)
        if self._snapshot is None:
            more = page.full and not self._sequencer.ring.covers(cursor)
        else:
            more = page.full and cursor < self._snapshot.until
        if more:
            self._reading = self._read(cursor)

    def _read(self, cursor: int) -> asyncio.Task[Page]:
        task = asyncio.create_task(self._read_page(cursor), name=f"backfill after {cursor}")
        # If the consumer is gone, nobody else retrieves the error of a failed read.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _read_page(self, cursor: int) -> Page:
        """Read one page. While the database is away, try again: the stream must survive this."""
        backoff = Backoff()
        while True:
            try:
                page = await self._pages.read(self._client, cursor, self._filter, self._snapshot)
                if page.floor > self._sequencer.floor:
                    await self._sequencer.read_state()
            except DatabaseRefused as error:
                # Each of 15,000 streams may log this line. `caused_by` limits them together.
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
