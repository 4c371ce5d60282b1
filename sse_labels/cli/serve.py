"""`sse-labels serve`: serves the stream until a signal ends it.

Promises: with a DSN only this process and its workers run. Without one the embedded PostgreSQL is
started before the server, kept running, and stopped after the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys

import click

from sse_labels import app as application
from sse_labels.cli.layout import Command
from sse_labels.cli.options import key_of, named_as_given, settings_options
from sse_labels.cli.place import Place, database_of
from sse_labels.cli.signals import Ready, interruptible, run_until_signal
from sse_labels.config import Settings, load
from sse_labels.logs import configure_logging
from sse_labels.workers import supervisor

log = logging.getLogger(__name__)

#: Starts one worker. -P: no module is imported from the working directory.
WORKER = (sys.executable, "-P", "-m", "sse_labels.cli.worker")


@click.command(cls=Command)
@settings_options()
def serve(**options: str | None) -> None:
    """Serve the stream, publishing, queries, health and metrics.

    Without --dsn an embedded PostgreSQL keeps the labels in --data-dir, and the
    first start makes a publish token there. Give secrets in the environment,
    because every user of the machine can see a command line. SIGTERM and Ctrl-C
    end all streams in order, and then the program.
    """
    with named_as_given(), contextlib.suppress(KeyboardInterrupt), interruptible():
        settings = load(options)
        configure_logging(
            settings.log_level,
            settings.log_format,
            lines_per_address=settings.log_lines_per_address,
        )
        with database_of(settings, key_of("dsn")) as place:
            if place.note and settings.log_format == "json":
                # A collector of JSON lines cannot read a plain line.
                log.info(place.note)
            elif place.note:
                click.echo(place.note, err=True)
            run(settings, place)


def run(
    settings: Settings,
    place: Place,
    ready: Ready | None = None,
) -> None:
    """Serve until a signal; raises the error that ends the server earlier."""

    async def serve_here(stop: asyncio.Event, up: Ready) -> None:
        app = application.App(settings, place.dsn, place.publish_token)

        def count_restart() -> None:
            app.metrics.count["embedded_restarts"] += 1

        if place.postgres is not None:
            place.postgres.on_restart = count_restart
        await application.serve(app, stop, up)

    async def serve_by_workers(stop: asyncio.Event, up: Ready) -> None:
        await supervisor.serve(
            settings, place.dsn, place.publish_token, stop, up,
            command=WORKER, postgres=place.postgres,
        )  # fmt: skip

    run_until_signal(serve_here if settings.workers == 1 else serve_by_workers, ready)
