"""A mirror's database statements, one typed method for each.

Promises: the labels and the upstream's cursor change in one transaction. If another process has
moved the cursor, nothing is stored.
Does not belong here: reading an upstream (`upstream`), when to try again (`following`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sse_labels.database.connection import Connection
from sse_labels.database.pool import Database
from sse_labels.protocol.label import Label


class Place(NamedTuple):
    """The position in an upstream: the last stored seq, and the epoch if the upstream sends one."""

    cursor: int
    epoch: str | None


class Aside(NamedTuple):
    """A label that is set aside: its place in the stream, the reason, and the label in DAG-CBOR."""

    seq: int
    place: int
    reason: str
    label: bytes


async def may_mirror(database: Database) -> bool:
    """Return whether this database role may store the labels of upstreams."""
    [(may,)] = await database.fetch("may_mirror")
    return bool(may)


async def own_sources(database: Database, sources: Sequence[str]) -> list[str]:
    """Return the `sources` whose labels this database itself publishes. No upstream may add any."""
    return [src for (src,) in await database.fetch("own_sources", sources=list(sources))]


class Stored(NamedTuple):
    """The number of new labels, and of left-out labels from the database's own sources."""

    new: int
    own: int


class UpstreamStore:
    """One upstream's cursor and labels, through the session that holds the upstream's lock."""

    def __init__(self, connection: Connection, url: str, source: str | None) -> None:
        """Each pair of `url` and `source` has its own cursor."""
        self._connection = connection
        self._name: dict[str, Any] = {"url": url, "source": source or ""}

    async def try_lock(self) -> bool:
        """Return whether this session got the lock. It keeps the lock until it is closed."""
        await self._connection.fetch("store_as_mirror")
        [(locked,)] = await self._connection.fetch("lock_upstream", **self._name)
        return bool(locked)

    async def place(self, first: int = 0) -> Place:
        """Return where to continue. A new upstream starts after `first`."""
        await self._connection.fetch("register_upstream", cursor=first, **self._name)
        [(cursor, epoch)] = await self._connection.fetch("upstream", **self._name)
        return Place(cursor, epoch)

    async def own_epoch(self) -> str:
        """Return the epoch of this database."""
        [(_, epoch, *_)] = await self._connection.fetch("state")
        return str(epoch)

    async def note_epoch(self, epoch: str) -> None:
        """Store the epoch to which the cursor belongs."""
        await self._connection.fetch("note_upstream_epoch", epoch=epoch, **self._name)

    async def rewind(self) -> None:
        """Set the cursor to 0. From now on a label equal to the newest of its key is not stored."""
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
        """Store the labels after `cursor`, and move the cursor to `until`.

        Labels of this database's own sources are left out. Returns None, and stores nothing, when
        the stored cursor is not `cursor`. `aside_count` labels were set aside, and `aside` holds
        those to keep. Only the newest `aside_max` of an upstream stay in the table.
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
