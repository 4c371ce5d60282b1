"""What a check says: one finding, and how findings are counted.

Promises: a finding names what was looked at, what was seen and, unless all is
well, what to do.
Does not belong here: how it is printed (`cli.doctor`).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Verdict(StrEnum):
    """How it stands with one thing; the words are those of the output."""

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
    #: What was looked at, in one or two words.
    subject: str
    #: What was seen.
    seen: str
    #: What to do; empty when nothing is to be done.
    do: str = ""


def ok(subject: str, seen: str) -> Finding:
    """Return that all is well."""
    return Finding(Verdict.OK, subject, seen)


def warning(subject: str, seen: str, do: str) -> Finding:
    """Return that it works, and will not for ever."""
    return Finding(Verdict.WARNING, subject, seen, do)


def failure(subject: str, seen: str, do: str) -> Finding:
    """Return that something does not work."""
    return Finding(Verdict.FAILURE, subject, seen, do)


def unchecked(subject: str, why: str, do: str = "") -> Finding:
    """Return that nobody looked."""
    return Finding(Verdict.UNCHECKED, subject, why, do)


def count(findings: Iterable[Finding]) -> dict[Verdict, int]:
    """Return how many findings there are of each verdict."""
    counted = dict.fromkeys(Verdict, 0)
    for finding in findings:
        counted[finding.verdict] += 1
    return counted
