"""The pool: a limited number of connections to PostgreSQL.

Promises: at most `max_connections` connections are lent at a time. Each leads to a primary whose
encoding is UTF8, and has the settings that the SQL needs. A lent connection is alive.

When libpq itself tries several addresses, it changes the socket while the event loop watches it. So
this module resolves the addresses first, and tries them one by one.
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

#: The loss of a silent connection is noticed within 25 s (10 + 3 x 5), or 15 s while data waits.
KEEPALIVE = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}
#: An idle connection that was used within this time is not checked.
TRUSTED_SECONDS = 1.0
#: Settings of every session, whatever the role, the database, the DSN or the environment say. The
#: block `begin_session` sets the rest. PostgreSQL 13 knows all of them, and any role may set them.
#: Nothing here depends on the time zone, the styles of dates and intervals, or planning. The user
#: decides about search_path (it finds the tables), time-outs, and default_transaction_read_only (a
#: provider sets it when the disk is full). Guarded by test_sessions.py.
PINNED = {
    # For the settled rule, each statement must see all that was committed before it.
    "default_transaction_isolation": "read committed",
    # psycopg2 and libpq quote strings according to this setting.
    "standard_conforming_strings": "on",
    # psycopg2 writes a list of None as '{NULL}'.
    "array_nulls": "on",
    # psycopg2 writes None as NULL.
    "transform_null_equals": "off",
    # Seconds since 1970 keep their microseconds.
    "extra_float_digits": "1",
    # A policy that hides rows must cause an error, because hidden labels would be skipped.
    "row_security": "off",
}
#: Labels are Unicode. A database with another encoding refuses some labels, or (SQL_ASCII) accepts
#: bytes that are not text.
ENCODING = "UTF8"


class Database:
    """A bounded pool of connections to one PostgreSQL server, or to the hosts of one cluster."""

    def __init__(
        self,
        dsn: str,
        *,
        connect_timeout_seconds: float,
        query_timeout_seconds: float,
        max_connections: int,
    ) -> None:
        """Raise ConfigError when libpq cannot read `dsn`."""
        try:
            self._dsn: dict[str, str] = parse_dsn(dsn)
        except psycopg2.ProgrammingError:
            # libpq's own message repeats parts of the DSN, perhaps a password.
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
        """Make all new sessions read-only: PostgreSQL then refuses every write."""
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
                reasons.append(self._reason(error))
        raise DatabaseUnavailable("cannot connect: " + "; ".join(reasons)) from cause

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer in {self._connect_timeout:g} s"
        # libpq's message is empty when there is no descriptor left for the socket.
        return str(error).strip() or "libpq gives no reason (are too many files open?)"

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[Connection]:
        """Lend a connection of the pool. While all of them are lent, wait."""
        async with self._slots:
            connection = await self._idle_connection() or await self.connect()
            try:
                yield connection
            finally:
                if self._closed:
                    connection.close()
                elif not connection.closed:
                    connection.returned_at = time.monotonic()
                    self._idle.append(connection)

    async def _idle_connection(self) -> Connection | None:
        """Return an idle connection that is alive, None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if time.monotonic() - connection.returned_at < TRUSTED_SECONDS:
                return connection
            try:
                # The server may have gone meanwhile. Then the borrower must not get the connection.
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
        """Close idle connections now, and lent ones when they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def _connect_to(self, address: Mapping[str, str]) -> Connection:
        pinned = PINNED | ({"default_transaction_read_only": "on"} if self._read_only else {})
        options = self._dsn.get("options", "")
        for name, value in pinned.items():
            # The last value of an option wins.
            options += f" -c {name}=" + value.replace(" ", r"\ ")
        defaults = {"application_name": "sse-labels", **KEEPALIVE}
        session = {"options": options, "client_encoding": ENCODING}
        dsn = make_dsn(**{**defaults, **self._dsn, **address, **session})
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
        # psycopg2 reads standard_conforming_strings once, when it connects. It must not be reset.
        again = {name: pinned[name] for name in pinned if name != "standard_conforming_strings"}
        try:
            [(standby, encoding, no_triggers, _)] = await connection.fetch(
                "begin_session",
                timeout_seconds=self._connect_timeout,
                names=list(again),
                values=list(again.values()),
            )
        except BaseException:
            connection.close()
            raise
        if standby:
            # A standby may lag, and does not show the primary's locks. The settled rule could not
            # see open transactions, and a page would end too early. Another host of the DSN may be
            # the primary.
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
            # Without triggers there are no notifications about new labels, and a mirror could
            # store labels of a source that this server publishes.
            connection.close()
            raise SchemaError(
                "session_replication_role",
                "replica",
                "origin: a superuser has turned triggers off for this role or database; "
                "ALTER ROLE … RESET session_replication_role, or ALTER DATABASE likewise",
            )
        return connection

    async def _addresses(self) -> list[dict[str, str]]:
        """Return the parameters to add to the DSN for each address, in the order to try them."""
        addresses = self._dsn.get("hostaddr", "").split(",")
        hosts = self._dsn.get("host", "," * (len(addresses) - 1)).split(",")
        ports = self._dsn.get("port", "").split(",")
        if len(addresses) == 1:
            addresses *= len(hosts)
        if len(addresses) != len(hosts):
            raise ConfigError(
                "--dsn", ",".join(addresses), f"as many addresses as hosts, which are {len(hosts)}"
            )
        if len(ports) not in (1, len(hosts)):
            raise ConfigError(
                "--dsn", ",".join(ports), f"one port, or {len(hosts)} as for the hosts"
            )
        if len(ports) == 1:
            ports *= len(hosts)
        found: list[dict[str, str]] = []
        for host, address, port in zip(hosts, addresses, ports, strict=True):
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
