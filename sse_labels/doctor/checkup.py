"""The checkup: all checks in their order.

Promises: findings come one by one, as they are made; a check that fails to look is
`unchecked` with the reason; when the first of a group fails, the others are not tried.
Does not belong here: what is looked at.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import httpx

from sse_labels.config import Settings
from sse_labels.database import Database
from sse_labels.doctor.database_checks import DatabaseChecks
from sse_labels.doctor.findings import Finding, failure, unchecked
from sse_labels.doctor.machine_checks import descriptors
from sse_labels.doctor.way_checks import WayChecks
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable, SchemaError
from sse_labels.schema import Schema
from sse_labels.store import Store

Checks = Mapping[str, Callable[[], Awaitable[list[Finding]]]]

#: No answer, or a refusal.
UNANSWERED = (DatabaseUnavailable, DatabaseRefused, SchemaError, httpx.HTTPError, OSError)
#: An answer that is not what sse-labels says: somebody else's, or that of another version.
NOT_UNDERSTOOD = (httpx.InvalidURL, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Patient:
    """What is looked at."""

    settings: Settings
    #: Where the labels are; None: not known here.
    dsn: str | None
    #: Whether that is the embedded PostgreSQL, whose only role may do everything.
    embedded: bool
    #: The server's address, as its readers know it; None: not known here.
    url: str | None
    token: str | None = None
    publish_as: str | None = None
    #: What is trusted over TLS.
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)


async def examine(patient: Patient) -> AsyncIterator[Finding]:
    """Yield what is found, in the order of a label's way."""
    database = None
    if patient.dsn is None:
        yield unchecked("database", "no --dsn, and no embedded PostgreSQL runs", "give --dsn")
    else:
        database = Database(
            patient.dsn,
            connect_timeout_seconds=patient.settings.connect_timeout_seconds,
            query_timeout_seconds=patient.settings.query_timeout_seconds,
            max_connections=1,
        )
    try:
        if database is not None:
            of = DatabaseChecks(database, patient.settings, embedded=patient.embedded)
            async for finding in _run(of.checks(), "is the database there, and --dsn right?"):
                yield finding
        for finding in descriptors(patient.settings):
            yield finding
        if patient.url is None:
            yield unchecked("address", "no address was given", "sse-labels doctor https://…")
            return
        way = WayChecks(
            patient.url,
            token=patient.token,
            tls=patient.tls,
            store=None if database is None else Store(database, Schema(database)),
            publish_as=patient.publish_as,
        )
        async for finding in _run(way.checks(), "does a server run there, and a proxy before it?"):
            yield finding
    finally:
        if database is not None:
            database.close()


async def _run(checks: Checks, hint: str) -> AsyncIterator[Finding]:
    """Run checks one after the other; the first says whether the others make sense."""
    first, *others = checks
    try:
        for finding in await checks[first]():
            yield finding
    except (*UNANSWERED, *NOT_UNDERSTOOD) as error:
        yield failure(first, _words(error), _remedy(error, hint))
        yield unchecked(", ".join(others), f"{first} failed")
        return
    for subject in others:
        try:
            for finding in await checks[subject]():
                yield finding
        except (*UNANSWERED, *NOT_UNDERSTOOD) as error:
            yield unchecked(subject, _words(error))


def _remedy(error: Exception, hint: str) -> str:
    return "see the message" if isinstance(error, DatabaseRefused | SchemaError) else hint


def _words(error: Exception) -> str:
    """Return what happened in one line."""
    if isinstance(error.__cause__, ssl.SSLError):
        error = error.__cause__
    if isinstance(error, NOT_UNDERSTOOD) and not isinstance(error, OSError):
        return f"the answer is not one of sse-labels, or of another version ({error!r})"
    return " ".join(str(error).split()) or type(error).__name__
