"""One database per test, and the events that its table must give.

Every delivery test ends with `received == database.stored()`. `stored` reads the table with
psycopg2 and makes the events here, without the service's code.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

#: The columns, keys and channel of `@atproto/ozone` 0.1.169; test_ozone.py runs the real Ozone.
OZONE_TABLES = """
CREATE TABLE label (
    id bigserial PRIMARY KEY, src varchar NOT NULL, uri varchar NOT NULL, cid varchar NOT NULL,
    val varchar NOT NULL, neg boolean NOT NULL, cts varchar NOT NULL, exp varchar, sig bytea,
    "signingKeyId" integer
);
CREATE UNIQUE INDEX unique_label_idx ON label (src, uri, cid, val);
CREATE TABLE moderation_event (id serial PRIMARY KEY);
CREATE TABLE signing_key (id serial PRIMARY KEY, key varchar NOT NULL);
"""


#: Settings of PostgreSQL that make it faster; after a crash of the machine all may be lost.
#: synchronous_commit stays on: commits keep the order that they have in production.
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


@contextmanager
def reachable_directory() -> Iterator[Path]:
    """A directory that a system user can enter; root's directory of pytest is closed to others."""
    directory = Path(tempfile.mkdtemp(prefix="sse-labels-test-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@dataclass
class TestDatabase:
    """The database of one test, migrated and empty."""

    __test__ = False
    dsn: str
    name: str
    _connections: list[Any] = field(default_factory=list)

    def connect(self, dsn: str | None = None, *, autocommit: bool = True) -> Any:
        """A psycopg2 connection for writers of the tests; it is closed after the test."""
        connection = psycopg2.connect(dsn or self.dsn)
        connection.autocommit = autocommit
        self._connections.append(connection)
        return connection

    @contextmanager
    def session(self) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
        """A function that runs statements on one connection, each in its own transaction.

        A new connection costs PostgreSQL ten times as much as most statements.
        """
        connection = psycopg2.connect(self.dsn)
        connection.autocommit = True

        def execute(sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters)
                return cursor.fetchall() if cursor.description else []

        try:
            yield execute
        finally:
            connection.close()

    def execute(self, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Run one statement on a new connection."""
        with self.session() as execute:
            return execute(sql, parameters)

    def url(self) -> str:
        """The DSN as a URI, for programs that accept no other form."""
        parts = parse_dsn(self.dsn)
        return (
            f"postgresql://{parts['user']}@/{parts['dbname']}"
            f"?host={quote(parts['host'], safe='')}&port={parts['port']}"
        )

    def insert(self, count: int = 1, **columns: Any) -> list[int]:
        """Store `count` labels; return their seqs."""
        with self.session() as execute:
            return [insert_with(execute, number, **columns) for number in range(count)]

    def fill(self, count: int) -> None:
        """Store many labels in one statement."""
        self.execute(
            "INSERT INTO label (src, uri, cid, val, neg, cts)"
            " SELECT 'did:plc:' || lpad((n %% 7)::text, 24, 'a'),"
            " 'at://did:plc:' || lpad(n::text, 24, 'b') || '/app.bsky.feed.post/3k' || n,"
            " 'bafyrei' || lpad(n::text, 52, 'c'), (ARRAY['spam','porn','rude'])[1 + n %% 3],"
            " n %% 12 = 0, '2026-01-01T00:00:00.000Z' FROM generate_series(1, %s) AS n",
            (count,),
        )

    def stored(self, after: int = 0) -> list[dict[str, Any]]:
        """Every event of the table after a cursor, as consumers must receive it."""
        rows = self.execute(
            "SELECT id, src, uri, cid, val, neg, cts, exp, sig FROM label WHERE id > %s"
            " ORDER BY id",
            (after,),
        )
        [(ours,)] = self.execute("SELECT to_regclass('sse_labels_migration') IS NOT NULL")
        if not ours:
            # Ozone signs `neg` only when it is true, and stores false when it was absent.
            rows = [(*row[:5], row[5] or None, *row[6:]) for row in rows]
        return [expected_event(*row) for row in rows]

    def backends(self, query: str = "") -> list[int]:
        """Pids of the service's sessions whose last statement matches a regular expression."""
        rows = self.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'sse-labels' AND query ~ %s ORDER BY pid",
            (query,),
        )
        return [pid for (pid,) in rows]

    def terminate(self, pids: list[int]) -> None:
        """End sessions; return when they have ended."""
        for pid in pids:
            assert self.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,)) == [(True,)]

    def waiting_for_locks(self) -> int:
        """The number of sessions of this database that wait for a lock."""
        [(count,)] = self.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return int(count)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


async def until(state: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Call `state` until it is true; return its value. The event loop runs in between."""
    async with asyncio.timeout(seconds):
        while True:
            reached = state()
            if inspect.isawaitable(reached):
                reached = await reached
            if reached:
                return reached
            await asyncio.sleep(0.01)


def insert_with(execute: Callable[..., Any], number: int = 0, **columns: Any) -> int:
    """Insert one label through `execute(sql, parameters)`; return its seq."""
    row = {
        "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
        "uri": f"at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k{number}",
        "cid": "",
        "val": "spam",
        "neg": None,
        "cts": "2026-01-01T00:00:00.000Z",
        "exp": None,
        "sig": None,
        **columns,
    }
    names = ", ".join(row)
    places = ", ".join(f"%({name})s" for name in row)
    rows = execute(f"INSERT INTO label ({names}) VALUES ({places}) RETURNING id", row)
    return int(rows[0][0])


def expected_event(
    seq: int, src: str, uri: str, cid: str, val: str, neg: bool, cts: str, exp: str, sig: Any
) -> dict[str, Any]:
    """The JSON of one row on the wire; it repeats the service's code on purpose."""
    label: dict[str, Any] = {"ver": 1, "src": src, "uri": uri, "val": val, "cts": cts}
    if cid:
        label["cid"] = cid
    if neg or (neg is not None and sig is not None):
        label["neg"] = neg
    if exp is not None:
        label["exp"] = exp
    if sig is not None:
        label["sig"] = {"$bytes": base64.b64encode(bytes(sig)).decode().rstrip("=")}
    return {"seq": seq, "labels": [label]}


@contextmanager
def role(database: TestDatabase, *grants: str) -> Iterator[str]:
    """The DSN of a new role that has only these rights in the database."""
    name = f"role_{database.name}"
    database.execute(f"CREATE ROLE {name} LOGIN")
    try:
        for grant in grants:
            database.execute(f"GRANT {grant} TO {name}")
        yield make_dsn(database.dsn, user=name)
    finally:
        database.close()
        database.execute(f"DROP OWNED BY {name}")
        database.execute(f"DROP ROLE {name}")
