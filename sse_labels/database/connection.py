"""One session with PostgreSQL. Only this module translates the driver's errors.

Promises: a call returns rows, or raises `DatabaseUnavailable` or `DatabaseRefused` with the
driver's error as its cause, or a real CancelledError. Every statement has a time-out and is its own
transaction (autocommit, READ COMMITTED).
Does not belong here: SQL, when to try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import aiopg
import psycopg2
from psycopg2.extensions import QueryCanceledError

from sse_labels.database.aiopg_fixes import keep_cancellation
from sse_labels.database.queries import block
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable, SseLabelsError

#: Classes of SQLSTATE (appendix A of PostgreSQL's manual) after which trying again helps: a lost
#: connection, a deadlock, a full disk or memory, an object in use, a shutdown, a system error, an
#: old snapshot, an internal error.
AWAY = frozenset(("08", "40", "53", "55", "57", "58", "72", "XX"))
#: A read-only transaction (the primary has become a standby, or the disk of a provider is full),
#: and two of the server's time-outs.
AWAY_STATES = frozenset(("25006", "25P03", "25P04"))
#: Classes for a statement that is wrong as such: an object does not exist, or a right is missing.
#: All remaining classes are about a value, a constraint, or a trigger with a code of its own.
NOT_OF_VALUES = frozenset(("0A", "25", "26", "28", "2B", "34", "3B", "3D", "3F", "42", "F0"))
NO_RIGHT = "42501"


class Connection:
    """One session, one statement at a time. It closes when the session, not a statement, fails."""

    def __init__(self, raw: aiopg.Connection, query_timeout_seconds: float) -> None:
        self._raw = raw
        self._timeout = query_timeout_seconds
        #: The time at which the pool got the connection back, by the monotonic clock.
        self.returned_at = 0.0

    @property
    def closed(self) -> bool:
        """Whether this connection can no longer be used."""
        return bool(self._raw.closed)

    async def fetch(
        self, name: str, *, timeout_seconds: float | None = None, **parameters: Any
    ) -> list[tuple[Any, ...]]:
        """Return the rows of one named block. A statement without a result gives an empty list."""
        return await self.execute(block(name), parameters, timeout_seconds=timeout_seconds)

    async def execute(
        self,
        sql: str,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> list[tuple[Any, ...]]:
        """Run one text, such as a migration. Several statements in it share a transaction."""
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
            # aiopg raises this also when the server cancels a query (a statement_timeout). A
            # TaskGroup would treat it as a cancellation of the task. Guarded by
            # test_statement_timeout_is_translated.
            self.close()
            if isinstance(error.__context__, QueryCanceledError):
                message = _message(error.__context__)
                raise DatabaseUnavailable(f"the server cancelled the query: {message}") from (
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

    async def _with_grants(self, message: str) -> str:
        """Add to PostgreSQL's message about a missing right the GRANT that helps, if it is known.

        The table is found by its name, which stands in the message in every language.
        """
        try:
            # A migration leaves an open, failed transaction, in which the next query would fail.
            await self._execute("ROLLBACK", None, self._timeout)
            rights = await self._execute(block("rights"), None, self._timeout)
        except SseLabelsError:
            return message
        names = set(re.findall(r"[\w$]+", message))
        missing = [
            (task, right, thing)
            for task, right, thing, held in rights
            if not held and task != "nothing" and thing and thing.split(".")[-1].strip('"') in names
        ]
        if not missing:
            return f"{message}; the README lists the rights that each task needs"
        task, _, thing = missing[0]
        needed = ", ".join(right for of, right, on in missing if (of, on) == (task, thing))
        kind = "SCHEMA " if task == "migrate" else ""
        return f"{message}: GRANT {needed} ON {kind}{thing} TO {self._raw.raw.info.user}"

    async def notified(self, timeout_seconds: float) -> set[str]:
        """Wait for a notification. Return the payloads of all that have come, perhaps none."""
        payloads: set[str] = set()
        try:
            async with asyncio.timeout(timeout_seconds):
                payloads.add((await self._raw.notifies.get()).payload)
            with contextlib.suppress(asyncio.QueueEmpty):
                while True:
                    # This also raises the loss of the connection, if it came with the notification.
                    payloads.add(self._raw.notifies.get_nowait().payload)
        except TimeoutError:
            return payloads
        except psycopg2.Error as error:
            self.close()
            raise DatabaseUnavailable(str(error).strip() or "the connection was lost") from error
        return payloads

    def close(self) -> None:
        """Close at once, without waiting for a running statement."""
        self._raw.close()


def _is_away(error: psycopg2.Error) -> bool:
    """Return whether trying again helps. An error without a code is a lost connection."""
    code = error.pgcode
    if code is None:
        return not isinstance(error, psycopg2.ProgrammingError)
    return code[:2] in AWAY or code in AWAY_STATES


def _refusal(error: psycopg2.Error) -> DatabaseRefused:
    code = error.pgcode or "42"
    return DatabaseRefused(
        f"the database refuses: {_message(error)}", of_values=code[:2] not in NOT_OF_VALUES
    )


def _message(error: psycopg2.Error) -> str:
    """Return PostgreSQL's message in one line, without the statement and the row."""
    message = error.diag.message_primary or str(error).strip() or type(error).__name__
    hint = error.diag.message_hint
    return " ".join((f"{message} ({hint})" if hint else message).split())
