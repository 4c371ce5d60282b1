"""The database of a command: that of a DSN, or the embedded PostgreSQL.

Promises: with a DSN nothing is started. Without one the embedded PostgreSQL runs while the command
runs, and is stopped when the command ends.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NamedTuple

from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn

from sse_labels.app import database_connections
from sse_labels.cli.signals import first_signal_held_back, on_signals
from sse_labels.config import Settings
from sse_labels.database.pool import Database
from sse_labels.embedded import EMBEDDED_MAX_CONNECTIONS, EmbeddedPostgres, default_data_dir
from sse_labels.errors import DatabaseUnavailable
from sse_labels.publishing.own_token import keep_token

#: Connections to the embedded PostgreSQL beside the server's: `migrate`, psql, its own reserve.
OTHER_CONNECTIONS = 20


class Place(NamedTuple):
    """The database of the labels, and the token that may publish."""

    dsn: str
    publish_token: str | None
    #: A sentence for the user; may be empty.
    note: str
    #: The embedded PostgreSQL; None with a DSN.
    postgres: EmbeddedPostgres | None = None


@contextlib.contextmanager
def database_of(settings: Settings, dsn_key: str = "--dsn") -> Iterator[Place]:
    """Yield the DSN of the settings, or run the embedded PostgreSQL and yield its DSN."""
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
            # Raised only at the start; a running server waits for a lost database.
            raise DatabaseUnavailable(f"{dsn_key}: {address_in(settings.dsn)}{error}") from error
        return
    data_dir = settings.data_dir or default_data_dir()
    needed = database_connections(settings) + OTHER_CONNECTIONS
    more = {"max_connections": str(needed)} if needed > EMBEDDED_MAX_CONNECTIONS else {}
    postgres = EmbeddedPostgres(data_dir, settings=more)
    try:
        with first_signal_held_back():
            postgres.start()
        postgres.keep_running()
        if settings.publish_token is not None:
            yield Place(postgres.dsn, settings.publish_token, "", postgres)
        else:
            token, path = keep_token(postgres.data_dir)
            yield Place(postgres.dsn, token, f"the publish token is in {path}", postgres)
    finally:
        # Another Ctrl-C would leave PostgreSQL running.
        on_signals(signal.SIG_IGN)
        postgres.stop()


def database_at(settings: Settings, dsn: str) -> Database:
    """Return access to a database for a command that runs one query at a time."""
    return Database(
        dsn,
        connect_timeout_seconds=settings.connect_timeout_seconds,
        query_timeout_seconds=settings.query_timeout_seconds,
        max_connections=1,
    )


def address_in(dsn: str) -> str:
    """Return host and port of a DSN, without its secrets; empty when it has neither."""
    try:
        parts = parse_dsn(dsn)
    except ProgrammingError:
        return ""
    host, port = parts.get("host", ""), parts.get("port", "")
    return f"{host}{':' if port else ''}{port}: " if host or port else ""
