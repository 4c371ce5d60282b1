"""One run: the readings in their order, and the report on them.

Promises: the first reading may be ended at any time, and what was read by then is judged whole.
Stands above the readers and the checks, which it puts together.
Does not belong here: options, signals, exit statuses (`cli.verify`).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import httpx

from sse_labels.signatures import SourceKeys
from sse_labels.verification.continuity import Continuity
from sse_labels.verification.crosscheck import CrossCheck, HoleCheck
from sse_labels.verification.event_stream import EventStreams, place_of
from sse_labels.verification.findings import Findings
from sse_labels.verification.first_reading import StreamReading
from sse_labels.verification.label_socket import SocketReading
from sse_labels.verification.patience import CONNECT_SECONDS, SILENCE_SECONDS
from sse_labels.verification.queries import LabelQueries
from sse_labels.verification.report import Report
from sse_labels.verification.second_reading import StreamAgain


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

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


class StreamRun:
    """Verifies an event stream."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._findings = Findings()
        self._continuity = Continuity(wanted.cursor, wanted.keys, self._findings)
        self._resources = ExitStack()
        timeout = httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
        client = httpx.Client(
            timeout=timeout, follow_redirects=True, verify=wanted.tls,
            headers=wanted.headers,
        )  # fmt: skip
        self._resources.enter_context(client)
        streams = EventStreams(client, wanted.url)
        self._again = StreamAgain(streams, wanted.retry_seconds)
        self._not_compared = why_not(wanted)
        self._queries = LabelQueries(client, wanted.url, wanted.retry_seconds)
        self._crosscheck = None if self._not_compared else CrossCheck(
            wanted.cursor, self._queries.page,
            self._again, self._findings, time.sleep,
        )  # fmt: skip
        self._reading = StreamReading(
            streams, self._continuity, self._crosscheck, self._findings,
            follow=wanted.follow, retry_seconds=wanted.retry_seconds, say=wanted.say,
        )  # fmt: skip

    def stop(self) -> None:
        """End the first reading; to be called by a signal, once.

        What it has read is still compared, and for that no server is waited for.
        """
        self._again.retry_seconds = self._queries.retry_seconds = 0.0
        self._reading.stop()

    def run(self) -> Report:
        """Read, read again, and return the report; raise Refused when there is no stream."""
        with self._resources:
            self._reading.run()
            self._continuity.close()
            holes = None
            if self._crosscheck is not None:
                self._crosscheck.compare(self._continuity.position)
                holes = HoleCheck(self._again, self._findings, time.sleep)
                if not (self._reading.interrupted and self._crosscheck.ended):
                    # Else whoever stopped it would wait again.
                    holes.run(self._continuity.holes.kept())
        return report_on(
            self._wanted, self._continuity, self._findings, head=self._reading.head,
            interrupted=self._reading.interrupted, crosscheck=self._crosscheck, holes=holes,
            not_compared=self._not_compared,
        )  # fmt: skip


class SocketRun:
    """Verifies a subscription over a WebSocket."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._findings = Findings()
        self._continuity = Continuity(wanted.cursor, wanted.keys, self._findings)
        self._reading = SocketReading(
            wanted.url, self._continuity, self._findings, headers=wanted.headers,
            tls=wanted.tls, follow=wanted.follow, quiet_seconds=wanted.quiet_seconds,
            retry_seconds=wanted.retry_seconds, say=wanted.say,
        )  # fmt: skip

    def stop(self) -> None:
        """End the reading; to be called from the event loop."""
        self._reading.stop()

    async def run(self) -> Report:
        """Read, and return the report; raise Refused when there is no subscription."""
        await self._reading.run()
        self._continuity.close()
        return report_on(
            self._wanted, self._continuity, self._findings, head=None,
            interrupted=self._reading.interrupted, crosscheck=None, holes=None,
            not_compared="a WebSocket has no second reading",
        )  # fmt: skip


def report_on(
    wanted: Wanted, continuity: Continuity, findings: Findings, *, head: int | None,
    interrupted: bool, crosscheck: CrossCheck | None, holes: HoleCheck | None, not_compared: str,
) -> Report:  # fmt: skip
    """Return the report on what was wanted and what came of it."""
    return Report(
        place=place_of(wanted.url),
        cursor=wanted.cursor,
        filtered=is_filtered(wanted.url),
        has_keys=wanted.keys is not None,
        follow=wanted.follow,
        interrupted=interrupted,
        head=head,
        continuity=continuity,
        findings=findings,
        crosscheck=crosscheck,
        holes=holes,
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
