"""`sse-labels reseed`: after a restore from a backup, no seq is used twice.

Promises: seqs up to the given seq are not used again. Consumers that name the earlier epoch get
EpochChanged. Stored labels are neither deleted nor changed. `database.epochs` notices that a
database was rebuilt.
"""

from __future__ import annotations

import asyncio

import click

from sse_labels.cli.layout import Command
from sse_labels.cli.options import key_of, named_as_given, option, settings_options, switch
from sse_labels.cli.place import database_at, database_of
from sse_labels.cli.signals import interruptible
from sse_labels.cli.standard_streams import write_result
from sse_labels.config import Settings, load
from sse_labels.database import epochs
from sse_labels.database.schema import Schema
from sse_labels.errors import ConfigError
from sse_labels.logs import configure_logging
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.setting_parsers import integer

#: The largest bigint is the last id; a sequence that has used it has no id left.
ABOVE_MAX = SEQ_MAX - 1


@click.command(cls=Command, short_help="Use no seq twice after a restore.")
@option(
    "above", integer(1, ABOVE_MAX), "The highest seq that any consumer has seen.", metavar="SEQ"
)
@switch("force", "Do it although other servers or commands are connected to that database.")
@settings_options("dsn", "data_dir", "connect_timeout_seconds", "log_level", "log_format")
def reseed(above: int | None, force: bool, **options: str | None) -> None:
    """Give new labels seqs above SEQ, and begin a new epoch.

    Run it after a database was rebuilt from a backup that lacks labels which
    consumers have seen. Without it, new labels would get seqs that consumers have
    already, and consumers would skip them. Run it before anything is published.
    It is refused while a server or a mirror runs on that database.
    """
    with named_as_given(), interruptible():
        if above is None:
            raise ConfigError("--above", None, "the highest seq that any consumer has seen")
        settings = load(options)
        configure_logging(settings.log_level, settings.log_format)
        with database_of(settings, key_of("dsn")) as place:
            seq, epoch = asyncio.run(move(settings, place.dsn, above, force=force))
    write_result(f"the next seq is {seq + 1}, the epoch is {epoch}")


async def move(settings: Settings, dsn: str, above: int, *, force: bool) -> tuple[int, str]:
    """Reseed the database; return the last seq that will not be used, and the new epoch."""
    database = database_at(settings, dsn)
    try:
        schema = Schema(database)
        await schema.check()
        if not schema.has_state:
            raise ConfigError("--dsn", "a database without label_stream", "one of `migrate`'s")
        others = await epochs.others_here(database)
        if others and not force:
            # They would continue with the old epoch and with the labels in their memory.
            pids = ", ".join(map(str, others))
            raise ConfigError(
                key_of("data_dir" if settings.dsn is None else "dsn"),
                f"a database with other sessions of sse-labels, PostgreSQL's processes {pids}",
                "one on which no server and no mirror runs; stop them, or give --force",
            )
        return await epochs.reseed(database, above)
    finally:
        database.close()
