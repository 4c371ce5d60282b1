"""`sse-labels reseed`: after a restore from a backup, use no seq twice.

Promises: seqs up to the one given are not used again, and consumers that name the
epoch of before are told; nothing is deleted, and nothing that is stored changes.
Does not belong here: noticing that a database was rebuilt (`lives`).
"""

from __future__ import annotations

import asyncio

import click

from sse_labels.cli.layout import Command
from sse_labels.cli.options import key_of, named_as_given, option, settings_options, switch
from sse_labels.cli.place import database_at, database_of
from sse_labels.cli.signals import interruptible
from sse_labels.cli.standard_streams import tell_result
from sse_labels.config import Settings, load
from sse_labels.database import lives
from sse_labels.database.schema import Schema
from sse_labels.errors import ConfigError
from sse_labels.logs import configure_logging
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.setting_parsers import integer

#: The largest bigint is PostgreSQL's last id; a sequence that stands there has none left.
ABOVE_MAX = SEQ_MAX - 1


@click.command(cls=Command, short_help="Use no seq twice after a restore.")
@option(
    "above", integer(1, ABOVE_MAX), "The highest seq that any consumer has seen.", metavar="SEQ"
)
@switch("force", "Do it although sessions of other servers or commands are on that database.")
@settings_options("dsn", "data_dir", "connect_timeout_seconds", "log_level", "log_format")
def reseed(above: int | None, force: bool, **options: str | None) -> None:
    """Give new labels seqs above SEQ, and begin a new epoch.

    For a database that was rebuilt from a backup older than what consumers have
    seen: without it, new labels would get seqs that consumers have already, and
    be skipped by them. Run it before anything is published, and while no server
    and no mirror runs on that database: it is refused while one does.
    """
    with named_as_given(), interruptible():
        if above is None:
            raise ConfigError("--above", None, "the highest seq that any consumer has seen")
        settings = load(options)
        configure_logging(settings.log_level, settings.log_format)
        with database_of(settings, key_of("dsn")) as place:
            seq, epoch = asyncio.run(move(settings, place.dsn, above, force=force))
    tell_result(f"the next seq is {seq + 1}, the epoch is {epoch}")


async def move(settings: Settings, dsn: str, above: int, *, force: bool) -> tuple[int, str]:
    """Return the last seq that will not be used, and the new epoch."""
    database = database_at(settings, dsn)
    try:
        schema = Schema(database)
        await schema.check()
        if not schema.has_state:
            raise ConfigError("--dsn", "a database without label_stream", "one of `migrate`'s")
        others = await lives.others_here(database)
        if others and not force:
            # They would go on with the old epoch, and what a server has in memory.
            pids = ", ".join(map(str, others))
            raise ConfigError(
                key_of("data_dir" if settings.dsn is None else "dsn"),
                f"a database with other sessions of sse-labels, PostgreSQL's processes {pids}",
                "one on which no server and no mirror runs; stop them, or give --force",
            )
        return await lives.reseed(database, above)
    finally:
        database.close()
