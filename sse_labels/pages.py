"""Pages of history, read once for all who ask for the same.

Promises: at most `max_reads` pages are being read at a time; readers that stand
at the same cursor share one read and one encoded chunk; a reader that goes away
does not cancel a query, because aiopg closes the connection of a cancelled one.
Stands in the corridor between the store and the outboxes' backfill.
Does not belong here: deciding what is settled, or how far a reader may go.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from sse_labels.chunk import kept_nbytes
from sse_labels.filters import Filter
from sse_labels.metrics import Metrics
from sse_labels.store import Page, Snapshot, Store

PageKey = tuple[int, Filter | None, Snapshot | None]


class Pages:
    """Reads pages for backfills; keeps full ones while they last, up to a bound in bytes."""

    def __init__(
        self,
        store: Store,
        head: Callable[[], int],
        metrics: Metrics,
        *,
        page_max_events: int,
        max_reads: int,
        cache_max_bytes: int,
    ) -> None:
        self._store = store
        self._head = head
        self._metrics = metrics
        self._limit = page_max_events
        self._slots = asyncio.Semaphore(max_reads)
        self._cache_max_bytes = cache_max_bytes
        self._cache: OrderedDict[PageKey, Page] = OrderedDict()
        self._cache_bytes = 0
        self._reading: dict[PageKey, asyncio.Task[Page]] = {}

    async def read(
        self, cursor: int, narrowed: Filter | None, snapshot: Snapshot | None = None
    ) -> Page:
        """Return the page after `cursor`, up to the head; raise DatabaseUnavailable.

        With `snapshot`, the page of that state instead of events.
        """
        key = (cursor, narrowed, snapshot)
        page = self._cache.get(key)
        if page is not None and time.time() < page.lasts_until:
            self._cache.move_to_end(key)
            self._metrics.count["backfill_page_hits"] += 1
        else:
            task = self._reading.get(key)
            if task is None:
                task = asyncio.create_task(self._fetch(key), name=f"page after {cursor}")
                # Whoever asked may be gone when it fails; then nobody else would look at the error.
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
                self._reading[key] = task
            page = await asyncio.shield(task)
        self._metrics.count["backfill_events"] += len(page.chunk)
        return page

    async def close(self) -> None:
        """End the reads that are under way; called when no stream is left."""
        reading = list(self._reading.values())
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    async def _fetch(self, key: PageKey) -> Page:
        cursor, narrowed, snapshot = key
        try:
            async with self._slots:
                if snapshot is not None:
                    page = await self._store.snapshot_page(cursor, snapshot, self._limit, narrowed)
                else:
                    # The head is read only now: it may have moved while this read waited its turn.
                    page = await self._store.page(cursor, self._head(), self._limit, narrowed)
        finally:
            del self._reading[key]
        self._metrics.count["backfill_pages"] += 1
        if page.full:
            self._keep(key, page)
        return page

    def _keep(self, key: PageKey, page: Page) -> None:
        before = self._cache.pop(key, None)
        if before is not None:
            self._cache_bytes -= kept_nbytes(before.chunk, key[1])
        self._cache[key] = page
        self._cache_bytes += kept_nbytes(page.chunk, key[1])
        while self._cache_bytes > self._cache_max_bytes:
            oldest, left = self._cache.popitem(last=False)
            self._cache_bytes -= kept_nbytes(left.chunk, oldest[1])
