"""`sse-labels serve` and `sse-labels migrate`.

Promises: with a DSN nothing is run but this process; without one the embedded
PostgreSQL is started before, and stopped after. SIGTERM and Ctrl-C drain.
Does not belong here: wiring (`app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import click

from sse_labels import app as application
from sse_labels import migrations
from sse_labels.cli.options import settings_options
from sse_labels.config import Settings, configure_logging, load
from sse_labels.database import Database
from sse_labels.embedded import EmbeddedPostgres, default_data_dir
from sse_labels.errors import SseLabelsError
from sse_labels.publish_token import keep_token


class Place(NamedTuple):
    """Where the labels are, and who may publish."""

    dsn: str
    publish_token: str | None
    note: str


@contextlib.contextmanager
def database_of(settings: Settings) -> Iterator[Place]:
    """Give the DSN that was set, or that of the embedded PostgreSQL, which runs meanwhile."""
    if settings.dsn is not None:
        token = settings.publish_token
        note = "" if token else "publishing is off: no publish token was given"
        yield Place(settings.dsn, token, note)
        return
    data_dir = settings.data_dir or default_data_dir()
    with EmbeddedPostgres(data_dir) as postgres:
        if settings.publish_token is not None:
            yield Place(postgres.dsn, settings.publish_token, "")
        else:
            token, path = keep_token(data_dir)
            yield Place(postgres.dsn, token, f"the publish token is in {path}")


def run(
    settings: Settings,
    place: Place,
    ready: Callable[[int], Awaitable[Any]] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; raise what ended it otherwise."""

    async def until_told() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        app = application.App(settings, place.dsn, place.publish_token)
        await application.serve(app, stop, ready)

    try:
        asyncio.run(until_told())
    except* SseLabelsError as group:
        # One task's failure ends all; its sentence is what the operator needs.
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


@click.command()
@settings_options()
def serve(**options: str | None) -> None:
    """Serve the stream, publishing, queries, health and metrics."""
    settings = load(options)
    configure_logging(settings.log_level)
    with database_of(settings) as place:
        if place.note:
            click.echo(place.note, err=True)
        run(settings, place)


@click.command()
@settings_options("dsn", "data_dir", "connect_timeout_seconds", "log_level")
def migrate(**options: str | None) -> None:
    """Bring the schema up to date, and end. Harmless when it is."""
    settings = load(options)
    configure_logging(settings.log_level)

    async def apply(dsn: str) -> int:
        database = Database(
            dsn,
            connect_timeout_seconds=settings.connect_timeout_seconds,
            query_timeout_seconds=settings.query_timeout_seconds,
            max_connections=1,
        )
        return await migrations.migrate(database)

    with database_of(settings) as place:
        click.echo(f"schema version {asyncio.run(apply(place.dsn))}")
