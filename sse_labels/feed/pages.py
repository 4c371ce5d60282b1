"""Pages of history, read once for all who ask for the same.

Promises: the rows of a page are read once for all filters; each of them selects from these rows
within the turn of a client that asked (`reads`), and what it selected is encoded once for all who
ask with the same filter. Full pages are kept, up to a bound in bytes.
Stands in the corridor between the store and the outboxes' backfill.
Does not belong here: deciding what is settled, or how far a reader may go.
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

#: What a page comes after, and what was asked for.
PageKey = tuple[int, Filter | None, Snapshot | None]
#: The same of its rows: what the table is asked for.
RowsKey = tuple[int, Filter | None, Snapshot | None, Literal["rows"]]
#: What is kept of what is not kept.
NOTHING = (None, 0)

#: Pages of the table that a filter looks at in one turn, while it lets hardly anything through …
LOOKED_AT_ONCE = 10
#: … and for how long: the turn of whoever reads without a filter takes about as long.
TURN_SECONDS = 0.005


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
        self._cache_max_bytes = cache_max_bytes
        #: Pages, and the rows that filters select from: by their keys, with what they take.
        self._cache: OrderedDict[PageKey | RowsKey, tuple[Any, int]] = OrderedDict()
        self._cache_bytes = 0
        self._reads = Reads(max_reads)
        #: What these read of the table, each of them one page at a time.
        self._table = Reads(max_reads)

    async def read(
        self,
        client: str,
        cursor: int,
        filter: Filter | None,
        snapshot: Snapshot | None = None,
    ) -> Page:
        """Return the page after `cursor`, up to the head; raise DatabaseUnavailable.

        With `snapshot`, the page of that state instead of events. It is read when it is the turn of
        `client`. Beside other clients a page that is kept has its turn too: to write it takes time.
        """
        key = (cursor, filter, snapshot)
        page: Page | None = self._kept(key) if self._reads.alone(client) else None
        if page is None:
            page = await self._reads.read(client, key, partial(self._page, key))
        self._metrics.count["backfill_events"] += len(page.chunk)
        return page

    async def turn(self, client: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` makes, when it is the turn of `client`: what is kept takes time, too.

        One for all who ask with the same `key`.
        """
        if self._reads.alone(client):
            await asyncio.sleep(0)
            return make()

        async def work() -> T:
            return make()

        return await self._reads.read(client, ("made", key), work)

    async def close(self) -> None:
        """End the reads that are under way; called when no stream is left."""
        await self._reads.close()
        await self._table.close()

    async def _page(self, key: PageKey) -> Page:
        page: Page | None = self._kept(key)
        if page is not None:
            return page
        cursor, filter, snapshot = key
        # Of a snapshot the database looks for sources and values; all else is looked for here.
        asked = filter.of_any_uri() if filter and snapshot else None
        if filter is None or filter == asked:
            found = await self._rows((cursor, asked, snapshot, "rows"), keep=False)
        else:
            found = await self._selected((cursor, asked, snapshot, "rows"), filter)
        chunk = encode_rows(found.rows, start=found.start, end=found.end)
        page = Page(chunk, found.full, found.floor, found.lasts_until)
        if page.full:
            self._keep(key, page, kept_nbytes(chunk, filter))
        return page

    async def _selected(self, key: RowsKey, filter: Filter) -> PageRows:
        """Return what `filter` lets through of a page, and of those behind it if that is little.

        A page at a time: others have their turn in the event loop between.
        """
        matches = filter.matches
        clock = asyncio.get_running_loop().time
        until = clock() + TURN_SECONDS
        first = page = looked = await self._rows(key, keep=True)
        rows = [row for row in page.rows if matches(row.src, row.uri, row.val)]
        lasts_until = page.lasts_until
        for _ in range(1, LOOKED_AT_ONCE):
            if not page.full or 2 * len(rows) >= self._limit or clock() > until:
                break
            await asyncio.sleep(0)
            page = await self._rows((page.end, *key[1:]), keep=True)
            more = [row for row in page.rows if matches(row.src, row.uri, row.val)]
            if page.floor > page.start + 1 or len(rows) + len(more) > self._limit:
                # What is gone is told at the beginning of a page.
                break
            rows += more
            looked, lasts_until = page, min(lasts_until, page.lasts_until)
        return PageRows(rows, first.start, looked.end, looked.full, first.floor, lasts_until)

    async def _rows(self, key: RowsKey, *, keep: bool) -> PageRows:
        """Return a page's rows, read once for all who ask; kept for other filters, if wanted."""
        found: PageRows | None = self._kept(key)
        if found is not None:
            return found
        return await self._table.read("", key, partial(self._fetch, key, keep))

    async def _fetch(self, key: RowsKey, keep: bool) -> PageRows:
        cursor, asked, snapshot, _ = key
        if snapshot is not None:
            found = await self._store.snapshot_page(cursor, snapshot, self._limit, asked)
        else:
            # The head is read only now: it may have moved while this read waited its turn.
            found = await self._store.page(cursor, self._head(), self._limit)
        self._metrics.count["backfill_pages"] += 1
        if keep and found.full:
            # Not later: whoever asks next would read them again.
            filter_nbytes = 0 if asked is None else asked.nbytes
            self._keep(key, found, KEPT_BYTES + found.nbytes + filter_nbytes)
        return found

    def _kept(self, key: PageKey | RowsKey) -> Any:
        """Return what is kept, None when there is nothing that still holds."""
        kept, _ = self._cache.get(key, NOTHING)
        if kept is None or time.time() >= kept.lasts_until:
            return None
        self._cache.move_to_end(key)
        self._metrics.count["backfill_page_hits"] += 1
        return kept

    def _keep(self, key: PageKey | RowsKey, page: Page | PageRows, nbytes: int) -> None:
        if nbytes > self._cache_max_bytes:
            # It would take the place of all others, and then leave itself.
            return
        _, before = self._cache.pop(key, NOTHING)
        self._cache[key] = page, nbytes
        self._cache_bytes += nbytes - before
        while self._cache_bytes > self._cache_max_bytes:
            _, (_, nbytes) = self._cache.popitem(last=False)
            self._cache_bytes -= nbytes
