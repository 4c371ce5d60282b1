"""One session with PostgreSQL, and the one edge at which the driver's errors are translated.

Promises: what leaves this file is rows, a `DatabaseUnavailable` or a
`DatabaseRefused` with the driver's error as its cause, or a genuine
cancellation; every statement runs by itself (autocommit, READ COMMITTED) and
has a time-out.
Does not belong here: SQL, what a row means, when to try again.
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
