"""The store: reads labels from the table, one typed method per question.

Promises: each method names the SQL block that it runs. Every error is one that `database` raises.
Does not belong here: when to read, how often to try again, which rows are settled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from sse_labels.database.connection import Connection
from sse_labels.database.pool import Database
from sse_labels.database.schema import Schema
from sse_labels.feed.chunk import Chunk, encode_rows
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.formats import expires_at
from sse_labels.protocol.label import Row

#: Rows that a snapshot looks at for each event that a page may have.
SNAPSHOT_WINDOW = 10
#: Rows that a query looks at, in the order of ids.
QUERY_WINDOW = 10_000
#: Rows that a query looks at by URI: fewer, because each may be on another page of the disk.
URI_WINDOW = 2500
#: The memory of a row without its texts: a tuple of nine, its place in a list, its number. And of a
#: signature without its bytes: a memoryview. Measured on CPython 3.11 by `tracemalloc`.
ROW_BYTES = 170
SIGNATURE_BYTES = 330
#: The index contains this many characters of a URI; the SQL says why.
INDEXED_URI_CHARS = 600


class PageRows(NamedTuple):
    """The rows of one page of history: all rows in `(start, end]`. If it is `full`, more follow.

    `floor` is above `start + 1` if retention deleted rows after `start`. The same read gives the
    same rows until `lasts_until`, in seconds since 1970.
    """

    rows: Sequence[Row]
    start: int
    end: int
    full: bool
    floor: int
    lasts_until: float = math.inf

    @property
    def nbytes(self) -> int:
        """The memory that the rows take, in bytes."""
        if not self.rows:
            return 0
        _, src, uri, cid, val, _, cts, exp, sig = zip(*self.rows, strict=True)
        texts = chain(src, uri, cid, val, cts, filter(None, exp))
        signatures = [SIGNATURE_BYTES + len(each) for each in sig if each]
        return ROW_BYTES * len(self.rows) + sum(map(str.__sizeof__, texts)) + sum(signatures)


class Page(NamedTuple):
    """One encoded page of history, without the events that a filter hides."""

    chunk: Chunk
    full: bool
    floor: int
    lasts_until: float = math.inf


class Snapshot(NamedTuple):
    """The labels in force as of seq `until`. `resumed`: the consumer has a part of them already.

    Such a consumer must also receive labels that were negated or have expired since.
    """

    until: int
    resumed: bool


class Found(NamedTuple):
    """The result of a query: all matching rows in `(cursor, end]`, by id. More may follow."""

    rows: list[Row]
    end: int


class TableState(NamedTuple):
    """The state of the table: the floor, the epoch, and the first label, settled or not.

    No label below `floor` is kept. `epoch` is None when the database has no epochs.
    """

    floor: int
    epoch: str | None
    first: int | None = None

    def oldest(self, head: int) -> int:
        """Return the first seq that a reader below the floor can get.

        `head` was settled when the state was read. Above `head`, smaller seqs may still appear.
        """
        if self.first is not None and self.first <= head:
            return self.first
        return max(self.floor, head + 1)


class Store:
    """Typed reads of the labels. All use the pool, except on the sequencer's own connection."""

    def __init__(
        self, database: Database, schema: Schema, *, withhold_unsigned: bool = False
    ) -> None:
        self.database = database
        self.schema = schema
        self._withhold_unsigned = withhold_unsigned

    async def dedicated(self) -> Connection:
        """Return a new connection for the caller alone. The caller closes it."""
        return await self.database.connect()

    async def newest(self, connection: Connection | None = None) -> int:
        """Return the newest seq in the database, settled or not; 0 when there is none."""
        source = self.database if connection is None else connection
        [(seq,)] = await source.fetch("newest")
        return int(seq)

    async def rows_after(self, connection: Connection, cursor: int, limit: int) -> list[Row]:
        """Return at most `limit` rows after `cursor`, by id. They may not be settled yet."""
        return self._rows(await connection.fetch("rows_after", cursor=cursor, limit=limit))

    async def sequence_holders(self, connection: Connection) -> frozenset[str]:
        """Return the open virtual transactions that took an id."""
        rows = await connection.fetch("sequence_holders")
        return frozenset(transaction for (transaction,) in rows)

    async def commit_age(self, connection: Connection, seq: int) -> float | None:
        """Return the seconds since `seq` was committed; None when the time is not recorded."""
        if not self.schema.has_commit_time:
            return None
        rows = await connection.fetch("commit_age", seq=seq)
        return rows[0][0] if rows else None

    async def state(self) -> TableState:
        """Return floor, epoch and first label of the table."""
        if not self.schema.has_state:
            return TableState(floor=1, epoch=None)
        [(floor, epoch, _, first)] = await self.database.fetch("state")
        return TableState(floor, epoch, first)

    async def page(self, cursor: int, head: int, limit: int) -> PageRows:
        """Return the rows after `cursor`: at most `limit`, and none beyond `head`."""
        rows = self._rows(await self.database.fetch("rows_after", cursor=cursor, limit=limit))
        full = len(rows) == limit and rows[-1].seq <= head
        if not full:
            # Rows beyond the head are not settled yet.
            rows = [row for row in rows if row.seq <= head]
        floor = 1
        if self.schema.has_state and (not rows or rows[0].seq != cursor + 1):
            # Retention deletes the oldest rows, and raises the floor before. Deleted rows appear
            # as a gap at the start of the page. The floor read now is at least as new as the page.
            floor = (await self.state()).floor
        end = rows[-1].seq if full else head
        return PageRows(self._shown(rows), cursor, end, full, floor)

    async def snapshot_page(
        self, cursor: int, snapshot: Snapshot, limit: int, filter: Filter | None
    ) -> PageRows:
        """Return the labels in force as of `snapshot.until` among the next rows after `cursor`.

        At most `limit` labels are returned, and ten times as many rows are looked at.
        """
        rows, end = await self._passing_after(
            filter,
            cursor,
            snapshot.until,
            limit,
            window=limit * SNAPSHOT_WINDOW,
            newest=True,
            in_force=not snapshot.resumed,
        )
        full = end < snapshot.until
        floor, lasts_until = 1, math.inf
        if snapshot.resumed:
            # A deleted negation is missing for this consumer. A new consumer does not need it.
            floor = (await self.state()).floor
        else:
            # Expired labels are left out, and no notice about them follows.
            rows, lasts_until = _not_expired(rows, time.time())
        return PageRows(self._shown(rows), cursor, end, full, floor, lasts_until)

    async def _passing_after(
        self,
        filter: Filter | None,
        cursor: int,
        until: int,
        limit: int,
        *,
        window: int,
        newest: bool,
        in_force: bool,
    ) -> Found:
        """Return at most `limit` rows that match, out of the next `window` rows after `cursor`."""
        found = await self.database.fetch(
            "passing_after",
            cursor=cursor,
            window=window,
            limit=limit,
            newest=newest,
            in_force=in_force,
            **self._filter_parameters(filter, until),
            uris=list(filter.uris) if filter else [],
            prefixes=list(filter.uri_prefixes) if filter else [],
        )
        # Each line has two facts of the window before the row; a line without a row has them alone.
        last, looked_at, *_ = found[0]
        rows = self._rows(row for _, _, *row in found if row[0] is not None)
        if len(rows) == limit:
            # The window may hold more matching rows: the next read starts after the last one.
            return Found(rows, rows[-1].seq)
        return Found(rows, min(last, until) if looked_at == window else until)

    def _filter_parameters(self, filter: Filter | None, until: int) -> dict[str, Any]:
        """Return the parameters that all blocks that select labels have in common."""
        return {
            "until": until,
            "unsigned": not self._withhold_unsigned,
            "sources": list(filter.sources) if filter else [],
            "values": list(filter.values) if filter else [],
            "keys_are_unique": self.schema.keys_are_unique,
        }

    async def expiring(
        self, date: str, seq: int, last_date: str, limit: int
    ) -> list[tuple[str, int, str]]:
        """Return at most `limit` (date, seq, exp) after `date` and `seq`, in the order of both.

        No date is above `last_date`. A date is that written in `exp`, in any time zone.
        """
        return await self.database.fetch(
            "expiring", date=date, seq=seq, last_date=last_date, limit=limit
        )

    async def still_in_force(self, seqs: Sequence[int], until: int) -> Sequence[Row]:
        """Return the rows that are the newest of their key as of `until`, unless withheld."""
        rows = self._rows(
            await self.database.fetch(
                "still_in_force",
                seqs=list(seqs),
                until=until,
                unsigned=not self._withhold_unsigned,
                keys_are_unique=self.schema.keys_are_unique,
            )
        )
        return self._shown(rows)

    def chunk(
        self,
        rows: Sequence[Row],
        *,
        start: int,
        end: int,
        with_keys: bool = False,
    ) -> Chunk:
        """Return the chunk of all settled rows in `(start, end]`, without the withheld ones."""
        return encode_rows(self._shown(rows), start=start, end=end, with_keys=with_keys)

    def _shown(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows without the withheld ones."""
        return [row for row in rows if row.sig] if self._withhold_unsigned else rows

    async def query(
        self,
        filter: Filter | None,
        cursor: int,
        head: int,
        limit: int,
        *,
        in_force: bool = False,
    ) -> Found:
        """Return at most `limit` matching rows after `cursor` up to `head`, by id, each once.

        With `in_force`, only the newest row of each key is returned, unless it is negated. Expired
        labels are returned too.
        The number of rows looked at is limited. Even if few rows were found, more may follow after
        `end`, unless `end` is the head.
        """
        selection: dict[str, Any] = {"newest": in_force, "in_force": in_force}
        if filter is None or not (filter.uris or filter.uri_prefixes):
            return await self._passing_after(
                filter, cursor, head, limit, window=QUERY_WINDOW, **selection
            )
        share = max(1, URI_WINDOW // (len(filter.uris) + len(filter.uri_prefixes)))
        common = {"cursor": cursor, "limit": limit, "window": share, **selection}
        common |= self._filter_parameters(filter, head)
        rows: list[Row] = []
        end = head
        for prefix in filter.uri_prefixes:
            # Ozone's table has no index for prefixes.
            found = [] if self.schema.attached else await self.database.fetch(
                "query_prefix",
                pattern=_like(prefix),
                head_pattern=_like(prefix[:INDEXED_URI_CHARS]),
                **common,
            )  # fmt: skip
            whole = found and found[0][0]
            if not whole:
                # Too many rows start with the prefix, and the index does not order them by id.
                return await self._passing_after(
                    filter, cursor, head, limit, window=QUERY_WINDOW, **selection
                )
            rows += self._rows(row for _, *row in found)
        if filter.uris:
            found = await self.database.fetch("query_exact", uris=list(filter.uris), **common)
            last, *_ = found[0]
            end = head if last is None else min(head, last)
            rows += self._rows(row for _, *row in found)
        # Each block returned its first `limit` rows. The first `limit` of all are among them.
        once = {row.seq: row for row in rows if row.seq is not None and row.seq <= end}
        first = [once[seq] for seq in sorted(once)[:limit]]
        return Found(first, first[-1].seq if len(first) == limit else end)

    def _rows(self, found: Iterable[Iterable[Any]]) -> list[Row]:
        """Return the rows as `Row`. In Ozone's table a false `neg` means that none was stated."""
        rows = list(map(Row._make, found))
        if not self.schema.attached:
            return rows
        return [row if row.neg else row._replace(neg=None) for row in rows]


def _not_expired(rows: Sequence[Row], now: float) -> tuple[list[Row], float]:
    """Return the rows that have not expired, and when the first of them expires."""
    left, first = [], math.inf
    for row in rows:
        at = expires_at(row.exp)
        if at is None:
            left.append(row)
        elif at > now:
            left.append(row)
            first = min(first, at)
    return left, first


def _like(prefix: str) -> str:
    """Return the LIKE pattern of all texts that start with `prefix`, taken literally."""
    return prefix.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_") + "%"
