"""Migrations: bring the schema up to date.

Promises: several servers may migrate at once, and any number of times. Each migration in
`sql/migrations/` is applied as a whole or not at all. A schema newer than this program, and a
`label` table of another program, are refused and not changed.
"""

from __future__ import annotations

import logging

from sse_labels.database.connection import Connection
from sse_labels.database.pool import Database
from sse_labels.database.queries import block, migrations
from sse_labels.errors import SchemaError

log = logging.getLogger(__name__)

#: Another server's migration, or building an index on a large table, may take long.
TIMEOUT_SECONDS = 3600.0


async def migrate(database: Database) -> int:
    """Apply the missing migrations. Return the schema's version.

    Raises SchemaError when the schema is newer than this program, or another program's.
    """
    connection = await database.connect()
    try:
        await connection.fetch("lock_schema", timeout_seconds=TIMEOUT_SECONDS)
        return await _apply_missing(connection)
    finally:
        # Closing ends the session, which releases the advisory lock.
        connection.close()


async def _apply_missing(connection: Connection) -> int:
    known = migrations()
    [(recorded, has_label)] = await connection.fetch("schema_exists")
    if not recorded and has_label:
        raise SchemaError(
            "--migrate",
            "on",
            "a database without a label table, or one that sse-labels made; this one belongs to "
            "another program (Ozone?): --no-migrate reads it as it is",
        )
    version = 0
    if recorded:
        [(version,)] = await connection.fetch("schema_version")
    if version > known[-1].number:
        raise SchemaError(
            "the database's schema",
            version,
            f"at most {known[-1].number}; a newer sse-labels made it: run that one or newer",
        )
    for step in known[version:]:
        # One text is one transaction in PostgreSQL's simple query protocol.
        create = "" if recorded else block("create_schema_record") + ";\n"
        record = block("record_migration") % {"number": step.number, "name": f"'{step.name}'"}
        await connection.execute(
            f"BEGIN;\n{create}{step.sql}\n;{record};\nCOMMIT", timeout_seconds=TIMEOUT_SECONDS
        )
        recorded = True
        log.info("migrated", extra={"number": step.number, "migration": step.name})
    return known[-1].number
