"""The store: what this service asks of its database, one typed method per question.

Promises: rows become chunks here, and only here; each method names the SQL
block it runs; every failure is one that `database` raises.
Stands at the start of the corridor: label row -> store -> sequencer -> …
Does not belong here: when to ask, how often to try again, what is settled.
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
#: Rows that a query looks at, in the order of ids …
QUERY_WINDOW = 10_000
#: … and by URIs, each of which is somewhere else on the disk.
URI_WINDOW = 2500
#: What a row takes beside its texts (a tuple of nine, its place in a list, its number), and its
#: signature beside its bytes: a memoryview. Measured on CPython 3.11 by `tracemalloc`.
ROW_BYTES = 170
SIGNATURE_BYTES = 330
#: As many characters of a URI are in the index; the SQL says why.
INDEXED_URI_CHARS = 600


class PageRows(NamedTuple):
    """The rows of one page of history: all in `(start, end]`; more follow if it is `full`.

    `floor` is above `start + 1` when retention came first. Read again, they would be the same until
    the time `lasts_until`, in seconds since 1970.
    """

    rows: Sequence[Row]
    start: int
    end: int
    full: bool
    floor: int
    lasts_until: float = math.inf

    @property
    def nbytes(self) -> int:
        """Return the memory that they take, in bytes."""
        if not self.rows:
            return 0
        _, src, uri, cid, val, _, cts, exp, sig = zip(*self.rows, strict=True)
        texts = chain(src, uri, cid, val, cts, filter(None, exp))
        signatures = [SIGNATURE_BYTES + len(each) for each in sig if each]
        return ROW_BYTES * len(self.rows) + sum(map(str.__sizeof__, texts)) + sum(signatures)


class Page(NamedTuple):
    """The same, encoded, less what a filter hides."""

    chunk: Chunk
    full: bool
    floor: int
    lasts_until: float = math.inf


class Snapshot(NamedTuple):
    """The state as of a seq; `resumed`: for a consumer that has a part of it already.

    Whoever has a part must learn of what was negated since, or has expired.
    """

    until: int
    resumed: bool


class Found(NamedTuple):
    """What a query found: all that matches in `(cursor, end]`, by id; more may follow."""

    rows: list[Row]
    end: int


class TableState(NamedTuple):
    """What readers must know beside the labels.

    Nothing below `floor` is kept; which seqs belong together (None: not kept here); and the first
    label that is kept, settled or not.
    """

    floor: int
    epoch: str | None
    first: int | None = None

    def oldest(self, head: int) -> int:
        """Return the first seq that a reader below the floor can get.

        `head` was settled when this was read; of what is above it smaller seqs may yet come.
        """
        if self.first is not None and self.first <= head:
            return self.first
        return max(self.floor, head + 1)


class Store:
    """Typed access to the labels; uses the pool, except for the sequencer's own connection."""

    def __init__(
        self, database: Database, schema: Schema, *, withhold_unsigned: bool = False
    ) -> None:
        self.database = database
        self.schema = schema
        self._withhold_unsigned = withhold_unsigned

    async def dedicated(self) -> Connection:
        """Return a connection that is the caller's own; the caller closes it."""
        return await self.database.connect()

    async def newest(self, connection: Connection | None = None) -> int:
        """Return the newest seq that the database knows, settled or not; 0 when there is none."""
        source = self.database if connection is None else connection
        [(seq,)] = await source.fetch("newest")
        return int(seq)

    async def rows_after(self, connection: Connection, cursor: int, limit: int) -> list[Row]:
        """Return at most `limit` rows after `cursor`, by id; not yet known to be settled."""
        return self._rows(await connection.fetch("rows_after", cursor=cursor, limit=limit))

    async def sequence_holders(self, connection: Connection) -> frozenset[str]:
        """Return the virtual transactions that took an id and have not ended."""
        rows = await connection.fetch("sequence_holders")
        return frozenset(row[0] for row in rows)

    async def commit_age(self, connection: Connection, seq: int) -> float | None:
        """Return the seconds since `seq` was committed; None when the database does not keep it."""
        if not self.schema.has_commit_time:
            return None
        rows = await connection.fetch("commit_age", seq=seq)
        return rows[0][0] if rows else None

    async def state(self) -> TableState:
        """Return what readers must know beside the labels."""
        if not self.schema.has_state:
            return TableState(floor=1, epoch=None)
        [(floor, epoch, _, first)] = await self.database.fetch("state")
        return TableState(floor, epoch, first)

    async def page(self, cursor: int, head: int, limit: int) -> PageRows:
        """Return what comes after `cursor`, at most `limit` rows and never beyond `head`."""
        rows = self._rows(await self.database.fetch("rows_after", cursor=cursor, limit=limit))
        full = len(rows) == limit and rows[-1].seq <= head
        if not full:
            # What lies beyond the head is not settled yet.
            rows = [row for row in rows if row.seq <= head]
        floor = 1
        if self.schema.has_state and (not rows or rows[0].seq != cursor + 1):
            # Retention takes rows from the old end and raises the floor before: rows it took
            # show as a gap at the page's beginning, and a floor read now is as new as the page.
            floor = (await self.state()).floor
        end = rows[-1].seq if full else head
        return PageRows(self._shown(rows), cursor, end, full, floor)

    async def snapshot_page(
        self, cursor: int, snapshot: Snapshot, limit: int, filter: Filter | None
    ) -> PageRows:
        """Return what is in force as of `snapshot.until` among the next rows after `cursor`.

        At most `limit` events, out of ten times as many rows.
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
            # A negation may have been deleted; what a new consumer does not get is not missing.
            floor = (await self.state()).floor
        else:
            # What expires is left out next time: who asks for `expired` as well is not told of it.
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
        """Return what passes of the next `window` rows after `cursor`, `limit` at most."""
        found = await self.database.fetch(
            "passing_after",
            cursor=cursor,
            window=window,
            limit=limit,
            newest=newest,
            in_force=in_force,
            **self._asked(filter, until),
            uris=list(filter.uris) if filter else [],
            prefixes=list(filter.uri_prefixes) if filter else [],
        )
        last, looked_at = found[0][:2]
        rows = self._rows(row[2:] for row in found if row[2] is not None)
        if len(rows) == limit:
            # The window may hold more: what comes next begins there.
            return Found(rows, rows[-1].seq)
        return Found(rows, min(last, until) if looked_at == window else until)

    def _asked(self, filter: Filter | None, until: int) -> dict[str, Any]:
        """Return what each block that looks for labels is told."""
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
        """Return at most `limit` (date, seq, exp) after a date and a seq, up to a date, by both.

        The date is the one that `exp` has written, whatever its offset.
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
        """Return the chunk of all settled rows in `(start, end]`, less what is withheld."""
        return encode_rows(self._shown(rows), start=start, end=end, with_keys=with_keys)

    def _shown(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows less what is withheld."""
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
        """Return at most `limit` rows after `cursor` up to `head` that match, by id, once each.

        With `in_force`, the newest of each key alone, unless negated; expired ones are there.
        It looks at so many rows and no more: there may be others behind `end`, unless that is the
        head, however few were found.
        """
        ways: dict[str, Any] = {"newest": in_force, "in_force": in_force}
        if filter is None or not (filter.uris or filter.uri_prefixes):
            return await self._passing_after(
                filter, cursor, head, limit, window=QUERY_WINDOW, **ways
            )
        share = max(1, URI_WINDOW // (len(filter.uris) + len(filter.uri_prefixes)))
        common = {"cursor": cursor, "limit": limit, "window": share, **ways}
        common |= self._asked(filter, head)
        rows: list[tuple[Any, ...]] = []
        end = head
        for prefix in filter.uri_prefixes:
            # Ozone's table has no index for prefixes.
            found = [] if self.schema.attached else await self.database.fetch(
                "query_prefix",
                pattern=_like(prefix),
                head_pattern=_like(prefix[:INDEXED_URI_CHARS]),
                **common,
            )  # fmt: skip
            if not (found and found[0][0]):
                # There are more than may be looked at, and the index does not have them by id.
                return await self._passing_after(
                    filter, cursor, head, limit, window=QUERY_WINDOW, **ways
                )
            rows += [row[1:] for row in found]
        if filter.uris:
            found = await self.database.fetch("query_exact", uris=list(filter.uris), **common)
            end = min(head, head if found[0][0] is None else found[0][0])
            rows += [row[1:] for row in found]
        # Each block returned its first `limit`: the first `limit` of all are among them.
        once = {row[0]: row for row in rows if row[0] is not None and row[0] <= end}
        first = self._rows(once[seq] for seq in sorted(once)[:limit])
        return Found(first, first[-1].seq if len(first) == limit else end)

    def _rows(self, found: Iterable[tuple[Any, ...]]) -> list[Row]:
        """Return rows of the table; in Ozone's a `neg` that is false was never stated."""
        rows = list(map(Row._make, found))
        if not self.schema.attached:
            return rows
        return [row if row.neg else row._replace(neg=None) for row in rows]


def _not_expired(rows: Sequence[Row], now: float) -> tuple[list[Row], float]:
    """Return the rows that have not expired, and when the first of them does."""
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
    """Return the LIKE pattern of all that starts with `prefix`, taken literally."""
    return prefix.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_") + "%"
