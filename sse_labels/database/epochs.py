"""Epochs of a database. Seqs of one epoch belong together.

Promises: a database that was rebuilt from a backup begins a new epoch before any label is streamed
from it. After `reseed`, no seq that a consumer has seen is used again.
Does not belong here: the answer to a consumer of another epoch (`web`).
"""

from __future__ import annotations

import logging

from sse_labels.database.pool import Database
from sse_labels.database.schema import Schema
from sse_labels.errors import SchemaError

log = logging.getLogger(__name__)


async def claim_epoch(database: Database, schema: Schema) -> str | None:
    """Return the epoch. Begin a new epoch if this database was rebuilt since the last claim.

    Raises SchemaError when a new epoch is needed and this role may not begin it.
    """
    if not schema.has_state:
        return None
    [(_, before, known, _)] = await database.fetch("state")
    [(identity,)] = await database.fetch("identity")
    if known == identity or (known is None and not schema.may_claim):
        return str(before)
    if not schema.may_claim:
        raise SchemaError(
            "label_stream.identity",
            known,
            f"{identity}: this database was rebuilt from a backup. Run `sse-labels migrate` as "
            "a role that may UPDATE label_stream, to begin a new epoch",
        )
    [(epoch,)] = await database.fetch("claim_identity", identity=identity)
    if epoch != before:
        log.warning(
            "this database was rebuilt: consumers that name the old epoch get an error. If the "
            "backup is older than the labels that consumers have seen, run `sse-labels reseed` "
            "before any label is published",
            extra={"old_epoch": before, "new_epoch": epoch},
        )
    return str(epoch)


async def others_here(database: Database) -> list[int]:
    """Return the sessions of servers and other commands on this database."""
    return [pid for (pid,) in await database.fetch("others_here")]


async def reseed(database: Database, above: int) -> tuple[int, str]:
    """Continue above seq `above` and begin a new epoch. Return the seq and the epoch."""
    [(seq, epoch)] = await database.fetch("reseed", above=above)
    return int(seq), str(epoch)
