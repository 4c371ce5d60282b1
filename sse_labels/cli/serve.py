"""`sse-labels serve` and `sse-labels migrate`.

Promises: with a DSN nothing is run but this process (and its workers); without one the embedded
PostgreSQL is started before, kept running, and stopped after, whenever one is told to stop.
SIGTERM, SIGHUP and Ctrl-C drain.
Does not belong here: wiring (`app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import click
from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn

from sse_labels import app as application
from sse_labels import migrations
from sse_labels.cli.layout import Command
from sse_labels.cli.options import key_of, named_as_given, settings_options
from sse_labels.cli.standard_streams import tell_result
from sse_labels.config import Settings, load
from sse_labels.database import Database
from sse_labels.embedded import EMBEDDED_MAX_CONNECTIONS, EmbeddedPostgres, default_data_dir
from sse_labels.errors import DatabaseUnavailable, SseLabelsError
from sse_labels.lives import claim_epoch
from sse_labels.logs import configure_logging
from sse_labels.publish_token import keep_token
from sse_labels.schema import Schema
from sse_labels.workers import supervisor

log = logging.getLogger(__name__)

#: What tells a server to stop. SIGHUP: its terminal was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


#: Starts one of several processes. -P: no module comes from the directory we happen to be in.
WORKER = (sys.executable, "-P", "-m", "sse_labels.cli.worker")

#: Connections to the embedded PostgreSQL beside a server's: `migrate`, psql, its own reserve.
OTHER_CONNECTIONS = 20

Ready = Callable[[int], Awaitable[Any]]


class Place(NamedTuple):
    """Where the labels are, and who may publish."""

    dsn: str
    publish_token: str | None
    note: str
    #: The embedded PostgreSQL, when it is that.
    postgres: EmbeddedPostgres | None = None


@contextlib.contextmanager
def database_of(settings: Settings, dsn_key: str = "--dsn") -> Iterator[Place]:
    """Give the DSN that was set, or that of the embedded PostgreSQL, which runs meanwhile."""
    if settings.dsn is not None:
        token = settings.publish_token
        note = (
            "publishing is off: neither --publish-token (SSE_LABELS_PUBLISH_TOKEN) nor "
            "--publish-tokens-file is given"
        )
        publishes = token or settings.publish_tokens_file
        try:
            yield Place(settings.dsn, token, "" if publishes else note)
        except DatabaseUnavailable as error:
            # Only a start can end like this: later on, a lost database is waited for.
            raise DatabaseUnavailable(f"{dsn_key}: {address_in(settings.dsn)}{error}") from error
        return
    data_dir = settings.data_dir or default_data_dir()
    needed = application.database_connections(settings) + OTHER_CONNECTIONS
    more = {"max_connections": str(needed)} if needed > EMBEDDED_MAX_CONNECTIONS else {}
    postgres = EmbeddedPostgres(data_dir, settings=more)
    try:
        with unhurried():
            postgres.start()
        postgres.keep_running()
        if settings.publish_token is not None:
            yield Place(postgres.dsn, settings.publish_token, "", postgres)
        else:
            token, path = keep_token(postgres.data_dir)
            yield Place(postgres.dsn, token, f"the publish token is in {path}", postgres)
    finally:
        # One more Ctrl-C of an impatient user would leave PostgreSQL running.
        on_signals(signal.SIG_IGN)
        postgres.stop()


def database_at(settings: Settings, dsn: str) -> Database:
    """Return the edge to a database for a command that asks one question at a time."""
    return Database(
        dsn,
        connect_timeout_seconds=settings.connect_timeout_seconds,
        query_timeout_seconds=settings.query_timeout_seconds,
        max_connections=1,
    )


def address_in(dsn: str) -> str:
    """Return the host and port in a DSN and nothing secret; empty when there is none."""
    try:
        parts = parse_dsn(dsn)
    except ProgrammingError:
        return ""
    host, port = parts.get("host", ""), parts.get("port", "")
    return f"{host}{':' if port else ''}{port}: " if host or port else ""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let whatever tells this process to stop end the block as Ctrl-C does."""
    on_signals(interrupt)
    yield


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Hold a first signal back until the block is done.

    A server that was interrupted while PostgreSQL starts would leave it half started.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    on_signals(note)
    yield
    on_signals(interrupt)
    if told:
        raise KeyboardInterrupt


def interrupt(number: int, frame: FrameType | None) -> None:
    """Do at any signal what Python does at SIGINT."""
    raise KeyboardInterrupt


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set what happens from now on when this process is told to stop."""
    for number in SIGNALS:
        # Left alone when ignored: that is what nohup does.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def run(
    settings: Settings,
    place: Place,
    ready: Ready | None = None,
) -> None:
    """Serve until told to stop; raise what ended it otherwise."""

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

    until_told(serve_here if settings.workers == 1 else serve_by_workers, ready)


def until_told(
    serve: Callable[[asyncio.Event, Ready], Awaitable[None]], ready: Ready | None = None
) -> None:
    """Run `serve(stop, up)`, and have it stop at the first signal; raise what ended it otherwise.

    It awaits `up` with the port once it serves; `ready` is awaited then.
    """

    async def serving() -> None:
        stop = asyncio.Event()
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        serves = False

        async def up(port: int) -> None:
            nonlocal serves
            serves = True
            if ready is not None:
                await ready(port)

        def drain() -> None:
            if task is not None and (stop.is_set() or not serves):
                task.cancel()  # told twice, or nothing to drain yet: wait for nobody
            stop.set()

        def told(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, we are leaving already
                loop.call_soon_threadsafe(drain)

        # Not loop.add_signal_handler: it leaves SIG_DFL behind, and a SIGTERM that came then
        # would end us before PostgreSQL is stopped.
        on_signals(told)
        await serve(stop, up)

    try:
        asyncio.run(serving())
    except asyncio.CancelledError:
        pass  # by `drain`
    except BaseExceptionGroup as group:
        ours, others = group.split(SseLabelsError)
        # One task's failure ends all; its sentence is what the operator needs.
        first: BaseException = group if ours is None else ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if others is not None:
            log.critical("a part of the server failed, which ends it", extra={"error": repr(first)})
            raise
        raise first from None


@click.command(cls=Command)
@settings_options()
def serve(**options: str | None) -> None:
    """Serve the stream, publishing, queries, health and metrics.

    Without --dsn an embedded PostgreSQL keeps the labels in --data-dir, and a
    publish token is made there once. Secrets are better given in the
    environment: a command line can be seen by everybody on the machine.
    SIGTERM and Ctrl-C end all streams in order, and then the program.
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
                # Whoever collects such lines reads no others.
                log.info(place.note)
            elif place.note:
                click.echo(place.note, err=True)
            run(settings, place)


@click.command(cls=Command)
@settings_options("dsn", "data_dir", "connect_timeout_seconds", "log_level", "log_format")
def migrate(**options: str | None) -> None:
    """Bring the schema up to date, and end. Harmless when it is.

    `serve` does it too, unless --no-migrate is given: this is for a role that may
    do it, where the one that serves may only read.
    """
    with named_as_given(), interruptible():
        settings = load(options)
        configure_logging(settings.log_level, settings.log_format)
        with database_of(settings, key_of("dsn")) as place:
            tell_result(f"schema version {asyncio.run(apply_migrations(settings, place.dsn))}")


async def apply_migrations(settings: Settings, dsn: str) -> int:
    """Return the version that the schema has afterwards."""
    database = database_at(settings, dsn)
    try:
        version = await migrations.migrate(database)
        schema = Schema(database)
        await schema.check()
        # After a restore this may be the one role that can begin a new epoch.
        await claim_epoch(database, schema)
    finally:
        database.close()
    return version
