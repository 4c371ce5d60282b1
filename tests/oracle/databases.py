"""The PostgreSQL of the oracle, and a database for each stage."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2.extensions import make_dsn

from sse_labels.embedded import EmbeddedPostgres

from support.database import NOT_DURABLE, TestDatabase, reachable_directory

_numbers = itertools.count()


@contextmanager
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL for one test module, which may kill it."""
    with (
        reachable_directory() as directory,
        EmbeddedPostgres(
            directory,
            settings={
                **NOT_DURABLE,
                "max_prepared_transactions": "50",
                "log_min_messages": "fatal",
            },
        ) as server,
    ):
        yield server


@contextmanager
def new_database(postgres: EmbeddedPostgres, statement_timeout: str) -> Iterator[TestDatabase]:
    """A new database with this `statement_timeout`; it is dropped after the block."""
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    name = f"stage_{next(_numbers)}"
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        cursor.execute(f"ALTER DATABASE {name} SET statement_timeout = %s", (statement_timeout,))
    admin.close()
    database = TestDatabase(make_dsn(postgres.dsn, dbname=name), name)
    try:
        yield database
    finally:
        database.close()
        with contextlib.suppress(psycopg2.Error):
            drop(postgres, name)


def drop(postgres: EmbeddedPostgres, name: str) -> None:
    """End the prepared transactions of a stage's database, and drop it."""
    inside = psycopg2.connect(make_dsn(postgres.dsn, dbname=name))
    inside.autocommit = True
    with inside.cursor() as cursor:
        cursor.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        for (gid,) in cursor.fetchall():
            cursor.execute("ROLLBACK PREPARED %s", (gid,))
    inside.close()
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()
