"""What a mirror asks of its database, one typed method per question.

Promises: labels and the upstream's cursor change in one transaction; a cursor that somebody else
has moved stores nothing.
Stands at the start of the corridor, beside the store: an upstream's labels become rows here.
Does not belong here: reading an upstream (`upstream`), when to try again (`following`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sse_labels.database.connection import Connection
from sse_labels.database.pool import Database
from sse_labels.protocol.label import Label


class Place(NamedTuple):
    """How far an upstream has been taken: its seq, and its epoch where it tells one."""

    cursor: int
    epoch: str | None


class Aside(NamedTuple):
    """A label that is not stored among the others: where it came, why, and itself in DAG-CBOR."""

    seq: int
    place: int
    reason: str
    label: bytes


async def may_mirror(database: Database) -> bool:
    """Say whether this role may store what upstreams send."""
    [(may,)] = await database.fetch("may_mirror")
    return bool(may)


async def own_sources(database: Database, sources: Sequence[str]) -> list[str]:
    """Return those of `sources` that are this database's own: no upstream speaks for them."""
    return [src for (src,) in await database.fetch("own_sources", sources=list(sources))]


class Stored(NamedTuple):
    """How many labels were new, and how many were of the database's own sources."""

    new: int
    own: int


class UpstreamStore:
    """One upstream's cursor and labels, through the one session that has its lock."""

    def __init__(self, connection: Connection, url: str, source: str | None) -> None:
        """An upstream that is followed for one `source` alone has a cursor of its own."""
        self._connection = connection
        self._name: dict[str, Any] = {"url": url, "source": source or ""}

    async def try_lock(self) -> bool:
        """Say whether this session may follow it now; it keeps the right until it is closed."""
        await self._connection.fetch("store_as_mirror")
        [(locked,)] = await self._connection.fetch("lock_upstream", **self._name)
        return bool(locked)

    async def place(self, first: int = 0) -> Place:
        """Return where to go on; when it was never followed, that is after `first`."""
        await self._connection.fetch("register_upstream", cursor=first, **self._name)
        [(cursor, epoch)] = await self._connection.fetch("upstream", **self._name)
        return Place(cursor, epoch)

    async def own_epoch(self) -> str:
        """Return the epoch of the database that labels are stored in."""
        [(_, epoch, *_)] = await self._connection.fetch("state")
        return str(epoch)

    async def note_epoch(self, epoch: str) -> None:
        """Remember which epoch the cursor belongs to."""
        await self._connection.fetch("note_upstream_epoch", epoch=epoch, **self._name)

    async def rewind(self) -> None:
        """Begin anew; from now on no label is stored that is the newest of its key already."""
        await self._connection.fetch("rewind_upstream", **self._name)

    async def store(
        self,
        cursor: int,
        until: int,
        labels: Sequence[Label],
        aside: Sequence[Aside],
        aside_count: int,
        aside_max: int,
    ) -> Stored | None:
        """Store what came after `cursor` and move it to `until`.

        Labels of this database's own sources are left out. None, and nothing is stored, when the
        cursor stands elsewhere. `aside_count` labels were set aside; of those that are kept, only
        the newest `aside_max` of an upstream stay.
        """
        columns: dict[str, Any] = {
            name: [getattr(label, name) for label in labels]
            for name in ("src", "uri", "cid", "val", "neg", "cts", "exp", "sig")
        }
        refused: dict[str, Any] = {
            f"aside_{name}": [getattr(each, name) for each in aside]
            for name in ("seq", "place", "reason", "label")
        }
        [(moved, new, own)] = await self._connection.fetch(
            "store_mirrored",
            cursor=cursor,
            until=until,
            **self._name,
            **columns,
            **refused,
            aside_count=aside_count,
            aside_max=aside_max,
        )
        return Stored(new, own) if moved else None
