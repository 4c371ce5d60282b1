"""Fixtures: a real PostgreSQL, a fresh database for each test, the application on it."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg2
import pytest
from hypothesis import settings
from psycopg2.extensions import make_dsn

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.database.migrations import migrate
from sse_labels.database.pool import Database
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.logs import TextFormatter

from support.database import NOT_DURABLE, TestDatabase, reachable_directory
from support.memory import folder_in_memory
from support.server import PUBLISH_TOKEN, QUICK, RunServer, Server

TEMPLATE = "sse_labels_template"

# How long an example takes says how busy the cores are.
settings.register_profile("whatever the time", deadline=None)
settings.load_profile("whatever the time")


def pytest_xdist_auto_num_workers() -> int:
    """How many processes run tests: one more than cores, because some tests only wait."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_configure() -> None:
    """Take what programs are started with: signals, descriptors, and a folder in memory."""
    # A shell that starts a run in the background has it ignore Ctrl-C, and programs inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # An ordinary user begins with 1,024; crowds of clients are in this process, too.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Those of the programs that it starts as well, if that will do.
    if folder := folder_in_memory():
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """pytest's; its `text` holds the fields of each line as well."""
    caplog.handler.setFormatter(TextFormatter())
    return caplog


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The server of the whole run."""
    with (
        reachable_directory() as directory,
        EmbeddedPostgres(
            directory, settings={**NOT_DURABLE, "max_prepared_transactions": "20"}
        ) as server,
    ):
        yield server


_names = itertools.count()


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """A migrated, empty database that tests are cloned from."""
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {TEMPLATE}")
    admin.close()

    async def apply() -> None:
        database = Database(
            make_dsn(postgres.dsn, dbname=TEMPLATE),
            connect_timeout_seconds=10,
            query_timeout_seconds=10,
            max_connections=1,
        )
        await migrate(database)
        database.close()

    asyncio.run(apply())
    return TEMPLATE


@contextmanager
def fresh_database(postgres: EmbeddedPostgres, template: str | None) -> Iterator[TestDatabase]:
    """A database made for the block and dropped after it."""
    name = f"test_{next(_names)}"
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    database = TestDatabase(make_dsn(postgres.dsn, dbname=name), name)
    try:
        with admin.cursor() as cursor:
            cursor.execute(
                # By its files: the other way writes all of them to the log, too.
                f"CREATE DATABASE {name} TEMPLATE {template or 'template0'} STRATEGY file_copy"
            )
        yield database
    finally:
        database.close()
        with admin.cursor() as cursor:
            cursor.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", (name,))
            left = [gid for (gid,) in cursor.fetchall()]
        if left:
            inside = psycopg2.connect(database.dsn)
            inside.autocommit = True
            with inside.cursor() as cursor:
                for gid in left:
                    cursor.execute("ROLLBACK PREPARED %s", (gid,))
            inside.close()
        with admin.cursor() as cursor:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        admin.close()


@pytest.fixture
def database(postgres: EmbeddedPostgres, template: str) -> Iterator[TestDatabase]:
    """A migrated, empty database of this test's own."""
    with fresh_database(postgres, template) as made:
        yield made


@pytest.fixture
def empty_database(postgres: EmbeddedPostgres) -> Iterator[TestDatabase]:
    """A database without any table."""
    with fresh_database(postgres, None) as made:
        yield made


@pytest.fixture
def run_server(database: TestDatabase) -> RunServer:
    """A function that runs the whole application on a port of its own, with settings."""

    @asynccontextmanager
    async def run(dsn: str | None = None, **settings: Any) -> AsyncIterator[Server]:
        app = App(Settings(**{**QUICK, **settings}), dsn or database.dsn, PUBLISH_TOKEN)
        async with app.running() as port:
            url = f"http://127.0.0.1:{port}"
            await app.feed.sequencer.started.wait()
            await app.feed.listener.listening.wait()
            yield Server(app, url, f"{url}/stream")

    return run


@pytest.fixture
async def server(run_server: RunServer) -> AsyncIterator[Server]:
    """A server with quick settings on this test's database."""
    async with run_server() as running:
        yield running
