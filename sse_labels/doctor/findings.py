"""The target of all checks, and the findings that the checks return.

The texts of a finding are printed as they are; `cli.doctor` prints and counts them.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from sse_labels.config import Settings
from sse_labels.database.pool import Database


@dataclass(frozen=True)
class Target:
    """The deployment that is checked."""

    settings: Settings
    #: The database of the labels; None: not known.
    database: Database | None
    #: Whether the database is the embedded PostgreSQL, whose only role has all rights.
    embedded: bool
    #: The server's address as its readers know it; None: not known.
    url: str | None
    token: str | None = None
    publish_as: str | None = None
    #: The certificates to trust.
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    #: It works, and may cause harm later.
    WARNING = "warning"
    #: Labels are lost, late, or not served at all.
    FAILURE = "failure"
    #: The check could not run; the finding says why.
    UNCHECKED = "unchecked"


class Finding(NamedTuple):
    """The result of one check."""

    verdict: Verdict
    #: What was seen.
    seen: str
    #: What to do; empty when nothing is to be done.
    do: str = ""
    #: The thing that was checked, in a few words. Empty: the key in `Checks`.
    subject: str = ""


ok = partial(Finding, Verdict.OK)
warning = partial(Finding, Verdict.WARNING)
failure = partial(Finding, Verdict.FAILURE)
unchecked = partial(Finding, Verdict.UNCHECKED)

Findings = Finding | list[Finding]
#: Checks by subject, in their order; when the first fails, the others are skipped.
Checks = Mapping[str, Callable[[], Awaitable[Findings]]]


def problems(*rules: object) -> list[Finding]:
    """Return the findings among rules such as `cycles and failure(…)`."""
    return [rule for rule in rules if isinstance(rule, Finding)]
