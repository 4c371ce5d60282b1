"""The schema: who owns the label table, what it contains, and which rights this role has.

Promises: `check` raises a SchemaError that says what to do, unless labels can be streamed without
loss. It reads, and changes nothing.
Does not belong here: applying migrations (`migrations`), reading labels (`store`).
"""

from __future__ import annotations

import logging

from sse_labels.database.pool import Database
from sse_labels.errors import SchemaError

log = logging.getLogger(__name__)


class Schema:
    """The tables of one database. The attributes are valid once `check` has returned."""

    def __init__(self, database: Database, source: str = "auto") -> None:
        """`source` says who owns the table to read: `own`, `ozone`, or `auto` to find out."""
        self._database = database
        self._source = source
        #: Whether the table is Ozone's: it is only read, never written.
        self.attached = False
        #: Whether the database has a floor and an epoch.
        self.has_state = False
        self.has_commit_time = False
        #: Whether each (src, uri, cid, val) has only its newest row, as in Ozone's table.
        self.keys_are_unique = False
        self.may_publish = False
        self.may_delete = False
        self.may_claim = False

    async def find_source(self) -> None:
        """Find out who owns the table. In Ozone's database, all later sessions are read-only.

        Raises SchemaError when the owner is not the given `source`.
        """
        [(is_ozone, is_own)] = await self._database.fetch("is_ozone")
        if self._source == "ozone" and not is_ozone:
            raise SchemaError(
                "--source",
                "ozone",
                "auto or own: this label table was made by sse-labels"
                if is_own
                else "a database in which Ozone keeps label, moderation_event and signing_key; "
                "when they are in a schema of their own, name it in the DSN: "
                "options=-csearch_path%3DSCHEMA",
            )
        if self._source == "own" and is_ozone:
            raise SchemaError("--source", "own", "auto or ozone: this database is Ozone's")
        self.attached = is_ozone
        if is_ozone:
            self._database.read_only()
            log.info("attached to Ozone: its label table is read, and nothing is written")

    async def check(self) -> None:
        """Raise SchemaError when nothing can be streamed from this database without loss."""
        [row] = await self._database.fetch("describe")
        has_label, has_state, sequence, cache, has_commit_time, version, unique, *rights = row
        if not has_label:
            raise SchemaError(
                "--dsn", "a database without a label table",
                "one that has it, in a schema of search_path that this role may use "
                "(GRANT USAGE ON SCHEMA); --migrate makes it",
            )  # fmt: skip
        if 130000 <= version <= 130004 or version == 140000:
            # In these versions PREPARE TRANSACTION changes the name of the transaction that holds a
            # lock. The transaction would seem to have ended (release notes of 13.5 and 14.1).
            raise SchemaError("the PostgreSQL server", version, "13.5, 14.1 or newer")
        if sequence is None:
            raise SchemaError("label.id", "no sequence", "an id that is filled by its own sequence")
        if cache != 1:
            raise SchemaError(
                f"the cache of sequence {sequence}",
                cache,
                "1, else sessions use ids that they took long ago, and labels could be skipped: "
                f"ALTER SEQUENCE {sequence} CACHE 1",
            )
        self.has_state = has_state
        self.has_commit_time = has_commit_time
        self.keys_are_unique = unique
        self.may_publish, self.may_delete, self.may_claim = rights
