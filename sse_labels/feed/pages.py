"""Pages: read and encode each page of history once for all consumers that need the page.

Promises: the rows of a page are read once for all filters. Each filter selects from these rows
within a turn of a client that asked for them (`reads`). The selected rows are encoded once for all
consumers with the same filter. Full pages are cached, up to a bound in bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, TypeVar

from sse_labels.feed.chunk import KEPT_BYTES, encode_rows, kept_nbytes
from sse_labels.feed.reads import Reads
from sse_labels.feed.store import Page, PageRows, Snapshot, Store
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter

T = TypeVar("T")

#: The cursor before a page, the consumer's filter and its snapshot.
PageKey = tuple[int, Filter | None, Snapshot | None]
#: The same for the page's rows; the filter is the part of it that the database applies.
RowsKey = tuple[int, Filter | None, Snapshot | None, Literal["rows"]]
#: The cache's answer for a missing entry.
MISSING = (None, 0)

#: A filter that matches few rows looks at this many pages of the table in one turn at most.
MAX_PAGES_PER_TURN = 10
#: Such a turn ends after this time: a turn without a filter takes about as long.
TURN_SECONDS = 0.005


class Pages:
    """Reads pages for backfills, and caches full ones while they are valid."""

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
        self._cache_max_bytes = cache_max_bytes
        #: Pages, and the rows that filters select from: by their keys, with their size in bytes.
        self._cache: OrderedDict[PageKey | RowsKey, tuple[Any, int]] = OrderedDict()
        self._cache_bytes = 0
        self._reads = Reads(max_reads)
        #: The reads of the table that those in `_reads` need, one page at a time each.
        self._table_reads = Reads(max_reads)

    async def read(
        self,
        client: str,
        cursor: int,
        filter: Filter | None,
        snapshot: Snapshot | None = None,
    ) -> Page:
        """Return the page after `cursor`, up to the head. With `snapshot`, a page of that state.

        The page is returned at the turn of `client`. If other clients ask too, a cached page also
        waits for its turn, because writing the page takes time. Raises DatabaseUnavailable.
        """
        key = (cursor, filter, snapshot)
        page: Page | None = self._cached(key) if self._reads.is_alone(client) else None
        if page is None:
            page = await self._reads.read(client, key, partial(self._page, key))
        self._metrics.count["backfill_events"] += len(page.chunk)
        return page

    async def turn(self, client: str, key: Hashable, make: Callable[[], T]) -> T:
        """Call `make` at the turn of `client`, and return its result.

        `make` is called once for all consumers that ask with the same `key`.
        """
        if self._reads.is_alone(client):
            await asyncio.sleep(0)
            return make()

        async def work() -> T:
            return make()

        return await self._reads.read(client, ("made", key), work)

    async def close(self) -> None:
        """Cancel the reads in progress. Called when no stream is left."""
        await self._reads.close()
        await self._table_reads.close()

    async def _page(self, key: PageKey) -> Page:
        page: Page | None = self._cached(key)
        if page is not None:
            return page
        cursor, filter, snapshot = key
        # For a snapshot the database filters by source and value; everything else is filtered here.
        in_database = filter.of_any_uri() if filter and snapshot else None
        if filter is None or filter == in_database:
            found = await self._rows((cursor, in_database, snapshot, "rows"), keep=False)
        else:
            found = await self._select((cursor, in_database, snapshot, "rows"), filter)
        chunk = encode_rows(found.rows, start=found.start, end=found.end)
        page = Page(chunk, found.full, found.floor, found.lasts_until)
        if page.full:
            self._keep(key, page, kept_nbytes(chunk, filter))
        return page

    async def _select(self, key: RowsKey, filter: Filter) -> PageRows:
        """Return the rows of a page that match `filter`; if few do, also of the next pages.

        The event loop runs other tasks between two pages.
        """
        matches = filter.matches
        clock = asyncio.get_running_loop().time
        until = clock() + TURN_SECONDS
        first = page = last = await self._rows(key, keep=True)
        rows = [row for row in page.rows if matches(row.src, row.uri, row.val)]
        lasts_until = page.lasts_until
        for _ in range(1, MAX_PAGES_PER_TURN):
            if not page.full or 2 * len(rows) >= self._limit or clock() > until:
                break
            await asyncio.sleep(0)
            page = await self._rows((page.end, *key[1:]), keep=True)
            more = [row for row in page.rows if matches(row.src, row.uri, row.val)]
            if page.floor > page.start + 1 or len(rows) + len(more) > self._limit:
                # Deleted events can be reported only before the first event of a page.
                break
            rows += more
            last, lasts_until = page, min(lasts_until, page.lasts_until)
        return PageRows(rows, first.start, last.end, last.full, first.floor, lasts_until)

    async def _rows(self, key: RowsKey, *, keep: bool) -> PageRows:
        """Return a page's rows, read once for all. `keep` caches them for other filters."""
        found: PageRows | None = self._cached(key)
        if found is not None:
            return found
        return await self._table_reads.read("", key, partial(self._fetch, key, keep))

    async def _fetch(self, key: RowsKey, keep: bool) -> PageRows:
        cursor, in_database, snapshot, _ = key
        if snapshot is not None:
            found = await self._store.snapshot_page(cursor, snapshot, self._limit, in_database)
        else:
            # The head is read only now: it may have moved while this read waited for its turn.
            found = await self._store.page(cursor, self._head(), self._limit)
        self._metrics.count["backfill_pages"] += 1
        if keep and found.full:
            # Cached at once: the next consumer would read the rows again.
            filter_nbytes = 0 if in_database is None else in_database.nbytes
            self._keep(key, found, KEPT_BYTES + found.nbytes + filter_nbytes)
        return found

    def _cached(self, key: PageKey | RowsKey) -> Any:
        """Return the cached page or rows; None when there are none that are still valid."""
        cached, _ = self._cache.get(key, MISSING)
        if cached is None or time.time() >= cached.lasts_until:
            return None
        self._cache.move_to_end(key)
        self._metrics.count["backfill_page_hits"] += 1
        return cached

    def _keep(self, key: PageKey | RowsKey, page: Page | PageRows, nbytes: int) -> None:
        if nbytes > self._cache_max_bytes:
            # The loop below would drop all other entries, and then this one too.
            return
        _, before = self._cache.pop(key, MISSING)
        self._cache[key] = page, nbytes
        self._cache_bytes += nbytes - before
        while self._cache_bytes > self._cache_max_bytes:
            _, (_, nbytes) = self._cache.popitem(last=False)
            self._cache_bytes -= nbytes
