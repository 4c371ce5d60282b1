"""One run: the readings in their order, and the report on them.

Promises: the first reading may be ended at any time, and what was read by then is judged whole.
Stands above the readers and the checks, which it puts together.
Does not belong here: options, signals, exit statuses (`cli.verify`).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import NamedTuple

import httpx

from sse_labels.client.answers import place_of
from sse_labels.client.event_reader import EventReader, client_of
from sse_labels.client.retries import Patience
from sse_labels.signatures import SourceKeys
from sse_labels.verification.continuity import Continuity
from sse_labels.verification.crosscheck import CrossCheck
from sse_labels.verification.findings import Findings
from sse_labels.verification.queries import LabelQueries
from sse_labels.verification.readings import SocketReading, StreamAgain, StreamReading
from sse_labels.verification.report import Report


class Wanted(NamedTuple):
    """What is to be verified, and how."""

    url: httpx.URL
    cursor: int
    token: str | None
    keys: SourceKeys | None
    follow: bool
    cross_check: bool
    quiet_seconds: float
    retry_seconds: float
    tls: ssl.SSLContext
    #: Tells the person at the terminal something.
    say: Callable[[str], None]


class StreamRun:
    """Verifies an event stream."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._client = client = client_of(wanted.token, wanted.tls)
        self._patience = Patience(wanted.retry_seconds)
        self._again = StreamAgain(client, wanted.url, wanted.retry_seconds)
        self._queries = LabelQueries(client, wanted.url, wanted.retry_seconds)
        self._report = report_on(wanted, why_not(wanted))
        findings, continuity = self._report.findings, self._report.continuity
        if not self._report.not_compared:
            self._report.crosscheck = CrossCheck(
                wanted.cursor, self._queries.page, self._again.after, findings, time.sleep
            )
        self._reading = StreamReading(
            EventReader(client, wanted.url, wanted.cursor, self._patience, wanted.say),
            continuity, self._report.crosscheck, findings, follow=wanted.follow, say=wanted.say,
        )  # fmt: skip

    def stop(self) -> None:
        """End the first reading; to be called by a signal, once.

        What it has read is still compared, and for that no server is waited for.
        """
        self._again.retry_seconds = self._queries.retry_seconds = 0.0
        self._reading.stop()

    def run(self) -> Report:
        """Read, read again, and return the report; raise Refused when there is no stream."""
        report, crosscheck = self._report, self._report.crosscheck
        with self._client:
            self._reading.run()
            report.head, report.interrupted = self._reading.head, self._reading.interrupted
            report.continuity.close()
            if crosscheck is not None:
                crosscheck.compare(report.continuity.position)
                if not (report.interrupted and crosscheck.ended):
                    # Else whoever stopped it would wait again.
                    crosscheck.read_holes(report.continuity.holes.kept())
        return report


class SocketRun:
    """Verifies a subscription over a WebSocket."""

    def __init__(self, wanted: Wanted) -> None:
        self._report = report_on(wanted, "a WebSocket has no second reading")
        self._reading = SocketReading(
            wanted.url, self._report.continuity, self._report.findings, token=wanted.token,
            tls=wanted.tls, follow=wanted.follow, quiet_seconds=wanted.quiet_seconds,
            retry_seconds=wanted.retry_seconds, say=wanted.say,
        )  # fmt: skip

    def stop(self) -> None:
        """End the reading; to be called from the event loop."""
        self._reading.stop()

    async def run(self) -> Report:
        """Read, and return the report; raise Refused when there is no subscription."""
        await self._reading.run()
        self._report.interrupted = self._reading.interrupted
        self._report.continuity.close()
        return self._report


def report_on(wanted: Wanted, not_compared: str) -> Report:
    """Return the report that is to be filled."""
    findings = Findings()
    return Report(
        place=place_of(wanted.url),
        cursor=wanted.cursor,
        filtered=is_filtered(wanted.url),
        has_keys=wanted.keys is not None,
        follow=wanted.follow,
        continuity=Continuity(wanted.cursor, wanted.keys, findings),
        findings=findings,
        not_compared=not_compared,
    )


def is_filtered(url: httpx.URL) -> bool:
    """Say whether an address asks for some labels only."""
    return any(name in url.params for name in ("sources", "uriPatterns", "values"))


def why_not(wanted: Wanted) -> str:
    """Return why there is no second reading, or nothing when there is one."""
    if not wanted.cross_check:
        return "--no-cross-check"
    if "snapshot" in wanted.url.params:
        return "a snapshot is a state, and changes"
    return ""
