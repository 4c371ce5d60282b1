"""What is looked at, and what a check says of it: findings, in the words of the output.

Does not belong here: how findings are printed and counted (`cli.doctor`).
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
    """What is looked at."""

    settings: Settings
    #: Where the labels are; None: not known here.
    database: Database | None
    #: Whether that is the embedded PostgreSQL, whose only role may do everything.
    embedded: bool
    #: The server's address, as its readers know it; None: not known here.
    url: str | None
    token: str | None = None
    publish_as: str | None = None
    #: What is trusted over TLS.
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)


class Verdict(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    #: It works, and somebody will be sorry.
    WARNING = "warning"
    #: Labels are lost, late, or not served at all.
    FAILURE = "failure"
    #: It could not be looked at; the finding says why.
    UNCHECKED = "unchecked"


class Finding(NamedTuple):
    """One thing that was looked at."""

    verdict: Verdict
    #: What was seen.
    seen: str
    #: What to do; empty when nothing is to be done.
    do: str = ""
    #: What was looked at, in one or two words; a check that says nothing else gets its own name.
    subject: str = ""


ok = partial(Finding, Verdict.OK)
warning = partial(Finding, Verdict.WARNING)
failure = partial(Finding, Verdict.FAILURE)
unchecked = partial(Finding, Verdict.UNCHECKED)

Findings = Finding | list[Finding]
#: By subject, in their order; the first says whether the others make sense.
Checks = Mapping[str, Callable[[], Awaitable[Findings]]]


def problems(*rules: object) -> list[Finding]:
    """Return what applies of rules such as `cycles and failure(…)`."""
    return [rule for rule in rules if isinstance(rule, Finding)]
