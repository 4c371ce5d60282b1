"""The backfill: one consumer's way through history, from its cursor to the ring.

Promises: `next` returns every settled event after the position that the filter lets through, once,
in order, at the consumer's pace: from the ring where it reaches so far, else from pages of the
table, one of them read ahead. It waits for a database that is away. With a snapshot it returns that
state first. It ends where the ring holds less than a page.
Does not belong here: what is live; what a consumer waits for (`outbox`).
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
    """Reads history for one consumer; to be closed by `close`."""

    __slots__ = (
        "_behind",
        "_client",
        "_filter",
        "_heartbeat_seconds",
        "_page_max_events",
        "_pages",
        "_reading",
        "_sequencer",
        "_snapshot",
        "from_ring",
        "position",
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
        """`client` is who reads: reads of history are shared by turns among clients."""
        self._sequencer = sequencer
        self._pages = pages
        self._client = client
        self._filter = filter
        self._snapshot = snapshot
        self._page_max_events = page_max_events
        self._heartbeat_seconds = heartbeat_seconds
        #: The next page, while it is being read.
        self._reading: asyncio.Task[Page] | None = None
        #: A page that was read already, and belongs behind the step that was returned.
        self._behind: Chunk | None = None
        #: Every event up to here was returned, or is hidden by the filter.
        self.position = position
        #: Whether the ring had all of it.
        self.from_ring = True

    def is_over(self) -> bool:
        """Say whether the ring holds what is left, and that is a page at most."""
        ring, most = self._sequencer.ring, self._page_max_events
        return (
            self._snapshot is None
            and self._behind is None
            and self.position + 1 >= self._sequencer.floor
            and ring.covers(self.position)
            and ring.count_after(self.position, most) <= most
        )

    async def next(self) -> Step | None:
        """Return the next step; None when there is none and `is_over` should be asked again.

        Raises HistoryRefused.
        """
        if self._behind is not None:
            chunk, self._behind = self._behind, None
            return self._events(chunk)
        if (outdated := self._skip_what_is_gone()) is not None:
            return outdated
        if self._snapshot is not None:
            if self.position >= self._snapshot.until:
                self._snapshot = None
                return SnapshotComplete(self.position)
        elif self._sequencer.ring.covers(self.position):
            # Others get their turn, also when the filter hides all.
            cut = partial(self._cut, self.position)
            page = await self._pages.turn(self._client, (self.position, self._filter), cut)
            return None if page is None else self._events(page)
        return await self._page()

    def close(self) -> None:
        """End what is being read; `next` then returns None."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()

    def _events(self, chunk: Chunk) -> Events:
        chunks = after_position([chunk], self.position)
        if chunks:
            self.position = chunks[-1].end
        return Events(chunks)

    def _cut(self, cursor: int) -> Chunk | None:
        """Return the page of the ring after `cursor`, None when it reaches no longer so far."""
        ring = self._sequencer.ring
        if not ring.covers(cursor):
            return None
        return ring.page(cursor, self._page_max_events, self._filter)

    def _skip_what_is_gone(self) -> Outdated | None:
        """Go on from the floor when the position is below it; return what to say, if anything."""
        cursor, floor = self.position, self._sequencer.floor
        if cursor + 1 >= floor:
            return None
        self.close()
        if self._snapshot is not None and not self._snapshot.resumed:
            # What a new consumer does not get is not missing.
            self.position = min(floor - 1, self._snapshot.until)
            return None
        self.position = self._sequencer.oldest - 1
        return Outdated(cursor, self._sequencer.oldest)

    async def _page(self) -> Step | None:
        """Return the next page of the table, or Silence while it takes long."""
        self.from_ring = False
        reading = self._reading
        if reading is None:
            reading = self._reading = self._read(self.position)
        await asyncio.wait({reading}, timeout=self._heartbeat_seconds)
        if self._reading is not reading:
            # Closed meanwhile.
            return None
        if not reading.done():
            return Silence()
        self._reading = None
        page = reading.result()
        # The floor may have risen since it was asked for; what is below it is cut off then.
        outdated = self._skip_what_is_gone()
        self._read_ahead(page)
        if outdated is None:
            return self._events(page.chunk)
        self._behind = page.chunk
        return outdated

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
                page = await self._pages.read(self._client, cursor, self._filter, self._snapshot)
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
