"""The pool: connections to PostgreSQL, each made as this program needs it.

Promises: at most so many connections are lent at a time; each is to a primary whose encoding is
UTF8, with the settings that the SQL depends on; a connection that is lent is alive.
Does not belong here: statements and their errors (`connection`).

libpq's own attempt at one address after the other changes the socket under the event loop, so
addresses are resolved first and tried one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiopg
import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from sse_labels.database.aiopg_fixes import keep_cancellation
from sse_labels.database.connection import Connection
from sse_labels.errors import ConfigError, DatabaseUnavailable, SchemaError

log = logging.getLogger(__name__)

#: A connection whose peer vanished is noticed in 25 s (10 + 3 x 5), or 15 s while data waits.
KEEPALIVE = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}
#: An idle connection of the pool that was used so recently is taken for alive.
TRUSTED_SECONDS = 1.0
#: What every session has, whatever the role, the database, the DSN or the environment say; the
#: block `begin_session` sets the rest. All are known to PostgreSQL 13 and may be set by any role.
#: Left to others, because nothing here depends on it: time zone, styles of dates and intervals,
#: planning. Theirs to say: search_path (where the tables are), time-outs, default_transaction_
#: read_only (a provider sets it when the disk is full). Guarded by test_sessions.py.
PINNED = {
    # The settled rule needs each statement to see what was committed since the one before.
    "default_transaction_isolation": "read committed",
    # psycopg2 and libpq quote by it.
    "standard_conforming_strings": "on",
    # psycopg2 writes a list of None as '{NULL}'.
    "array_nulls": "on",
    # psycopg2 writes None as NULL.
    "transform_null_equals": "off",
    # Seconds since 1970 keep their microseconds.
    "extra_float_digits": "1",
    # A policy that hides labels is an error, for they would be skipped.
    "row_security": "off",
}
#: Labels are Unicode, and a database of another encoding refuses some of them, or (SQL_ASCII) takes
#: bytes that are no text.
ENCODING = "UTF8"


class Database:
    """One PostgreSQL server (or the hosts of one cluster), and a bounded pool of connections."""

    def __init__(
        self,
        dsn: str,
        *,
        connect_timeout_seconds: float,
        query_timeout_seconds: float,
        max_connections: int,
    ) -> None:
        """Raise ConfigError when `dsn` is not one that libpq can read."""
        try:
            self._dsn: dict[str, str] = parse_dsn(dsn)
        except psycopg2.ProgrammingError:
            # libpq's own message repeats parts of the DSN, and a password may be one of them.
            raise ConfigError(
                "--dsn", "(not shown)", "a connection URI postgresql://…, or host=… dbname=…"
            ) from None
        self._connect_timeout = connect_timeout_seconds
        self._query_timeout = query_timeout_seconds
        self._slots = asyncio.Semaphore(max_connections)
        self._idle: list[Connection] = []
        self._closed = False
        self._read_only = False

    def read_only(self) -> None:
        """Let PostgreSQL refuse every write of the sessions that begin from now on."""
        self._read_only = True
        while self._idle:
            self._idle.pop().close()

    async def connect(self) -> Connection:
        """Return a new connection to the first address that accepts one."""
        reasons: list[str] = []
        cause: BaseException | None = None
        for address in await self._addresses():
            try:
                return await self._connect_to(address)
            except (psycopg2.Error, TimeoutError, OSError, DatabaseUnavailable) as error:
                cause = error
                reasons.append(self._why(error))
        raise DatabaseUnavailable("cannot connect: " + "; ".join(reasons)) from cause

    def _why(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer in {self._connect_timeout:g} s"
        # libpq says nothing when there is no descriptor left for the socket.
        return str(error).strip() or "libpq gives no reason (are too many files open?)"

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[Connection]:
        """Lend a connection of the pool; waits while all of them are lent."""
        async with self._slots:
            connection = await self._rested() or await self.connect()
            try:
                yield connection
            finally:
                if self._closed:
                    connection.close()
                elif not connection.closed:
                    connection.returned_at = time.monotonic()
                    self._idle.append(connection)

    async def _rested(self) -> Connection | None:
        """Return an idle connection that is alive, None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if time.monotonic() - connection.returned_at < TRUSTED_SECONDS:
                return connection
            try:
                # Its server may be gone since, and the one who asks next should not find out.
                await connection.fetch("ping", timeout_seconds=self._connect_timeout)
            except DatabaseUnavailable:
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        return None

    async def fetch(self, name: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of one named block, run on a connection of the pool."""
        async with self.borrow() as connection:
            return await connection.fetch(name, **parameters)

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def _connect_to(self, address: Mapping[str, str]) -> Connection:
        pinned = PINNED | ({"default_transaction_read_only": "on"} if self._read_only else {})
        options = self._dsn.get("options", "")
        for name, value in pinned.items():
            # What comes later in the options wins.
            options += f" -c {name}=" + value.replace(" ", r"\ ")
        mine = {"application_name": "sse-labels", **KEEPALIVE}
        session = {"options": options, "client_encoding": ENCODING}
        dsn = make_dsn(**{**mine, **self._dsn, **address, **session})
        async with asyncio.timeout(self._connect_timeout):
            connecting = aiopg.connect(
                dsn,
                timeout=self._connect_timeout,
                enable_json=False,
                enable_hstore=False,
                enable_uuid=False,
            )
            raw = await keep_cancellation(connecting, undo=aiopg.Connection.close)
        connection = Connection(raw, self._query_timeout)
        # psycopg2 quotes as it found the strings when it connected, and they must stay so.
        dropped = {name: pinned[name] for name in pinned if name != "standard_conforming_strings"}
        try:
            [(standby, encoding, no_triggers, _)] = await connection.fetch(
                "begin_session",
                timeout_seconds=self._connect_timeout,
                names=list(dropped),
                values=list(dropped.values()),
            )
        except BaseException:
            connection.close()
            raise
        if standby:
            # It may lag, and shows none of the primary's locks: the settled rule would be blind,
            # and a page read here would end too early. Another host of the DSN may be the primary.
            connection.close()
            raise DatabaseUnavailable("this server is a standby")
        if encoding != ENCODING:
            connection.close()
            raise SchemaError(
                "the encoding of the database",
                encoding,
                "UTF8, which can hold every label: make another database by CREATE DATABASE labels "
                "TEMPLATE template0 ENCODING 'UTF8', and copy this one's tables into it by "
                "pg_dump --encoding=UTF8 and psql",
            )
        if no_triggers:
            # Nobody would be told of new labels, nor a mirror kept from sources that are ours.
            connection.close()
            raise SchemaError(
                "session_replication_role",
                "replica",
                "origin: a superuser has turned triggers off for this role or database; "
                "ALTER ROLE … RESET session_replication_role, or ALTER DATABASE likewise",
            )
        return connection

    async def _addresses(self) -> list[dict[str, str]]:
        """Return what to add to the DSN for each address, in the order to try them."""
        given = self._dsn.get("hostaddr", "").split(",")
        hosts = self._dsn.get("host", "," * (len(given) - 1)).split(",")
        ports = self._dsn.get("port", "").split(",")
        if len(given) == 1:
            given *= len(hosts)
        if len(given) != len(hosts):
            raise ConfigError(
                "--dsn", ",".join(given), f"as many addresses as hosts, which are {len(hosts)}"
            )
        if len(ports) not in (1, len(hosts)):
            raise ConfigError(
                "--dsn", ",".join(ports), f"one port, or {len(hosts)} as for the hosts"
            )
        if len(ports) == 1:
            ports *= len(hosts)
        found: list[dict[str, str]] = []
        for host, address, port in zip(hosts, given, ports, strict=True):
            place = {"host": host} if host else {}
            if address:
                place["hostaddr"] = address
            if port:
                place["port"] = port
            if address or not host or host.startswith(("/", "@")):
                found.append(place)
                continue
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(
                    host, port or 5432, type=socket.SOCK_STREAM
                )
            except OSError as error:
                log.warning("cannot resolve a database host", extra={"host": host, "error": error})
                continue
            found += [{**place, "hostaddr": str(answer[4][0])} for answer in answers]
        if not found:
            raise DatabaseUnavailable(f"none of the hosts resolves: {', '.join(hosts)}")
        return found
