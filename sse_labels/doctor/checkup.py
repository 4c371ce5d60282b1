"""Runs all checks in their order.

Promises: each finding is yielded as soon as it is made. A check that cannot run becomes a finding
`unchecked` with the reason. When the first check of a group fails, the others of the group are not
run.
"""

from __future__ import annotations

import resource
import ssl
from collections.abc import AsyncIterator

import httpx

from sse_labels.app import database_connections
from sse_labels.client.event_stream import MessageTooLong
from sse_labels.config import Settings
from sse_labels.doctor.database_checks import DatabaseChecks
from sse_labels.doctor.findings import Checks, Finding, Target, failure, ok, unchecked, warning
from sse_labels.doctor.way_checks import WayChecks
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable, SchemaError
from sse_labels.web.door.guard import descriptors_needed

#: Errors of a check that got no answer or a refusal.
UNANSWERED = (DatabaseUnavailable, DatabaseRefused, SchemaError, httpx.HTTPError, OSError)
#: Errors of a check that got an answer which is not one of this version of sse-labels.
NOT_UNDERSTOOD = (httpx.InvalidURL, KeyError, TypeError, ValueError, MessageTooLong)


async def examine(target: Target) -> AsyncIterator[Finding]:
    """Yield all findings, in the order from the database to the reader."""
    if target.database is None:
        why = "no --dsn, and no embedded PostgreSQL runs"
        yield unchecked(why, "give --dsn", "database")
    else:
        of = DatabaseChecks(target.database, target.settings, embedded=target.embedded)
        async for finding in _run(of.checks(), "is the database there, and --dsn right?"):
            yield finding
    yield descriptors(target.settings)
    if target.url is None:
        yield unchecked("no address was given", "sse-labels doctor https://…", "address")
        return
    way = WayChecks(target, target.url)
    async for finding in _run(way.checks(), "does a server run there, and a proxy before it?"):
        yield finding


def descriptors(settings: Settings) -> Finding:
    """Check that the limit of open files allows as many connections as the settings.

    The hard limit of this process is compared, because a server raises its soft limit to the hard
    one. A service may have another limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.of_one_worker().max_connections
    needed = descriptors_needed(wanted, database_connections(settings))
    shown = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
    seen = f"{shown} files may be open here, {wanted} connections need {needed}"
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return ok(seen, subject="descriptors")
    return warning(
        f"{seen}: a server started like this refuses connections before its limit",
        "raise LimitNOFILE (systemd, as nginx/sse-labels@.service does) or `ulimit -Hn`, or "
        "lower --max-connections",
        "descriptors",
    )


async def _run(checks: Checks, hint: str) -> AsyncIterator[Finding]:
    """Run checks one after the other; when the first fails, skip the others."""
    first, *others = checks
    for subject, check in checks.items():
        try:
            said = await check()
        except (*UNANSWERED, *NOT_UNDERSTOOD) as error:
            if subject == first:
                refused = isinstance(error, DatabaseRefused | SchemaError)
                yield failure(_words(error), "see the message" if refused else hint, subject)
                yield unchecked(f"{first} failed", subject=", ".join(others))
                return
            said = unchecked(_words(error))
        for finding in [said] if isinstance(said, Finding) else said:
            yield finding._replace(subject=finding.subject or subject)


def _words(error: Exception) -> str:
    """Return the error in one line."""
    if isinstance(error.__cause__, ssl.SSLError):
        error = error.__cause__
    if isinstance(error, NOT_UNDERSTOOD) and not isinstance(error, OSError):
        return f"the answer is not one of sse-labels, or of another version ({error!r})"
    return " ".join(str(error).split()) or type(error).__name__
