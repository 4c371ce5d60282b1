"""Connections to PostgreSQL, and the one edge at which the driver's errors are translated.

Promises: what leaves this file is rows, a `DatabaseUnavailable` or a
`DatabaseRefused` with the driver's error as its cause, or a genuine
cancellation; every statement runs by itself (autocommit, READ COMMITTED) and
has a time-out.
Stands in the corridor under the store.
Does not belong here: SQL, what a row means, when to try again.

aiopg's traps that are closed here: a server-side cancel arrives as
`CancelledError`, and a genuine one may be swallowed; a time-out closes the
connection; a connection attempt that moves to another address changes the
socket under the event loop, so addresses are resolved first and tried one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import select
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import aiopg
import aiopg.connection
import psycopg2
from psycopg2.extensions import QueryCanceledError, make_dsn, parse_dsn

from sse_labels.errors import (
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    SchemaError,
    SseLabelsError,
)
from sse_labels.queries import block

log = logging.getLogger(__name__)

T = TypeVar("T")

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

#: Classes of SQLSTATE (appendix A of PostgreSQL's manual) after which trying again helps: a lost
#: connection, a deadlock, no room, an object in use, a shutdown, a system error, an old snapshot,
#: an internal error.
AWAY = frozenset(("08", "40", "53", "55", "57", "58", "72", "XX"))
#: A read-only transaction (a primary that has become a standby, a provider whose disk is full), and
#: two of the server's time-outs.
AWAY_STATES = frozenset(("25006", "25P03", "25P04"))
#: The other classes that do not speak of values: what was asked for is not there, or not allowed.
#: All that is left is a value, a constraint, or a trigger with a code of its own choosing.
ASKED_WRONGLY = frozenset(("0A", "25", "26", "28", "2B", "34", "3B", "3D", "3F", "42", "F0"))
NO_RIGHT = "42501"


class SelectByPoll:
    """What aiopg asks `select` for: whether a descriptor is still open, beyond 1,023 too.

    `select.select` raises ValueError there, which aiopg does not expect: a lost connection would
    end the server as soon as it holds a thousand streams.
    """

    @staticmethod
    def select(
        readers: list[int], writers: list[int], others: list[int], timeout: float
    ) -> tuple[list[int], list[int], list[int]]:
        """Raise OSError(EBADF) when one of `readers` is closed; nobody looks at the answer."""
        poll = select.poll()
        for descriptor in readers:
            poll.register(descriptor, select.POLLIN)
        if any(seen & select.POLLNVAL for _, seen in poll.poll(1000 * timeout)):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return [], [], []


aiopg.connection.select = SelectByPoll  # type: ignore[attr-defined,assignment]


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


class Connection:
    """One session; one statement at a time. After a failure that is not the statement's, closed."""

    def __init__(self, raw: aiopg.Connection, query_timeout_seconds: float) -> None:
        self._raw = raw
        self._timeout = query_timeout_seconds
        #: When the pool got it back, by the monotonic clock.
        self.returned_at = 0.0

    @property
    def closed(self) -> bool:
        """Whether this connection can no longer be used."""
        return bool(self._raw.closed)

    async def fetch(
        self, name: str, *, timeout_seconds: float | None = None, **parameters: Any
    ) -> list[tuple[Any, ...]]:
        """Return the rows of one named block; an empty list for a statement without a result."""
        return await self.execute(block(name), parameters, timeout_seconds=timeout_seconds)

    async def execute(
        self,
        sql: str,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> list[tuple[Any, ...]]:
        """Run one statement text (migrations are such); several in one text share a transaction."""
        timeout = self._timeout if timeout_seconds is None else timeout_seconds
        try:
            return await self._execute(sql, parameters, timeout)
        except DatabaseRefused as error:
            if getattr(error.__cause__, "pgcode", None) != NO_RIGHT:
                raise
            raise DatabaseRefused(await self._with_grants(str(error))) from error.__cause__

    async def _execute(
        self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] | None, seconds: float
    ) -> list[tuple[Any, ...]]:
        try:
            async with self._raw.cursor() as cursor:
                await keep_cancellation(cursor.execute(sql, parameters or None, timeout=seconds))
                if cursor.description is None:
                    return []
                rows: list[tuple[Any, ...]] = await cursor.fetchall()
                return rows
        except asyncio.CancelledError as error:
            # aiopg raises this for a server-side cancel (a statement_timeout) too; a TaskGroup
            # would take it for a cancellation. Guarded by test_statement_timeout_is_translated.
            self.close()
            if isinstance(error.__context__, QueryCanceledError):
                said = _words(error.__context__)
                raise DatabaseUnavailable(f"the server cancelled the query: {said}") from (
                    error.__context__
                )
            raise
        except TimeoutError as error:
            self.close()
            raise DatabaseUnavailable(f"no answer within {seconds:g} s") from error
        except psycopg2.Error as error:
            if not _is_away(error):
                raise _refusal(error) from error
            self.close()
            raise DatabaseUnavailable(str(error).strip() or type(error).__name__) from error

    async def _with_grants(self, said: str) -> str:
        """Return what PostgreSQL says of a missing right, and what grants it, if that is known.

        The names of what it is about stand in every language.
        """
        try:
            # A migration is a transaction, and this would fail in it.
            await self._execute("ROLLBACK", None, self._timeout)
            rights = await self._execute(block("rights"), None, self._timeout)
        except SseLabelsError:
            return said
        names = set(re.findall(r"[\w$]+", said))
        missing = [
            (task, right, thing)
            for task, right, thing, held in rights
            if not held and task != "nothing" and thing and thing.split(".")[-1].strip('"') in names
        ]
        if not missing:
            return f"{said}; the README lists the rights that each task needs"
        task, _, thing = missing[0]
        needed = ", ".join(right for of, right, on in missing if (of, on) == (task, thing))
        kind = "SCHEMA " if task == "migrate" else ""
        return f"{said}: GRANT {needed} ON {kind}{thing} TO {self._raw.raw.info.user}"

    async def notified(self, timeout_seconds: float) -> set[str]:
        """Wait for a notification; return the payloads of all that wait, none if none came."""
        payloads: set[str] = set()
        try:
            async with asyncio.timeout(timeout_seconds):
                payloads.add((await self._raw.notifies.get()).payload)
            with contextlib.suppress(asyncio.QueueEmpty):
                while True:
                    # Raises the loss of the connection too, when it came with the notification.
                    payloads.add(self._raw.notifies.get_nowait().payload)
        except TimeoutError:
            return payloads
        except psycopg2.Error as error:
            self.close()
            raise DatabaseUnavailable(str(error).strip() or "the connection was lost") from error
        return payloads

    def close(self) -> None:
        """Close at once; a statement under way is abandoned."""
        self._raw.close()


def _is_away(error: psycopg2.Error) -> bool:
    """Say whether trying again helps; without a code the connection is lost."""
    code = error.pgcode
    if code is None:
        return not isinstance(error, psycopg2.ProgrammingError)
    return code[:2] in AWAY or code in AWAY_STATES


def _refusal(error: psycopg2.Error) -> DatabaseRefused:
    code = error.pgcode or "42"
    return DatabaseRefused(
        f"the database refuses: {_words(error)}", of_values=code[:2] not in ASKED_WRONGLY
    )


def _words(error: psycopg2.Error) -> str:
    """Return what PostgreSQL says in one line, without the statement and the row."""
    said = error.diag.message_primary or str(error).strip() or type(error).__name__
    hint = error.diag.message_hint
    return " ".join((f"{said} ({hint})" if hint else said).split())


async def keep_cancellation(
    waiting: Awaitable[T], undo: Callable[[T], object] = lambda result: None
) -> T:
    """Await `waiting`; raise the CancelledError that it swallowed, after `undo(result)`.

    aiopg waits by `asyncio.wait_for`, which before Python 3.12 returns the result and forgets
    the cancellation when both arrive in the same step of the event loop. A server that was told
    to stop then follows its table for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        result = await waiting
    except Exception as error:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task is not None and task.cancelling() > before:
        undo(result)
        raise asyncio.CancelledError
    return result
