"""`sse-labels migrate`."""

from __future__ import annotations

import asyncio

import click

from sse_labels.cli.layout import Command
from sse_labels.cli.options import key_of, named_as_given, settings_options
from sse_labels.cli.place import database_at, database_of
from sse_labels.cli.signals import interruptible
from sse_labels.cli.standard_streams import write_result
from sse_labels.config import Settings, load
from sse_labels.database import migrations
from sse_labels.database.epochs import claim_epoch
from sse_labels.database.schema import Schema
from sse_labels.logs import configure_logging


@click.command(cls=Command)
@settings_options("dsn", "data_dir", "connect_timeout_seconds", "log_level", "log_format")
def migrate(**options: str | None) -> None:
    """Bring the schema up to date. Changes nothing when it is up to date.

    `serve` does the same at its start, unless --no-migrate is given. Use this
    command when only another role than that of `serve` may change tables.
    """
    with named_as_given(), interruptible():
        settings = load(options)
        configure_logging(settings.log_level, settings.log_format)
        with database_of(settings, key_of("dsn")) as place:
            write_result(f"schema version {asyncio.run(apply_migrations(settings, place.dsn))}")


async def apply_migrations(settings: Settings, dsn: str) -> int:
    """Migrate the database; return the new version of its schema."""
    database = database_at(settings, dsn)
    try:
        version = await migrations.migrate(database)
        schema = Schema(database)
        await schema.check()
        # After a restore perhaps only this role has the right to begin a new epoch.
        await claim_epoch(database, schema)
    finally:
        database.close()
    return version
