"""The settings of a verification, and its report, as lines for a person or as JSON.

Promises: the lines are few and aligned, and their length does not grow with the stream. Text from
a server is printable.
Does not belong here: the checks, and printing (`cli.verify`).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx

from sse_labels.client.answers import place_of
from sse_labels.protocol.formats import shown
from sse_labels.protocol.signatures import SourceKeys, Verdict
from sse_labels.verify.continuity import HOLES_MAX, OTHER_SOURCES, Continuity
from sse_labels.verify.crosscheck import CrossCheck
from sse_labels.verify.findings import Findings

#: Parameters that hide labels. Hidden labels leave holes.
FILTERS = ("sources", "uriPatterns", "values")
#: The time between two lines about the progress.
PROGRESS_SECONDS = 10.0
#: The width of the longest name of a line.
NAME_COLUMNS = 13
#: The most sources in the lines. The JSON has more.
SOURCES_SHOWN = 20


class Wanted(NamedTuple):
    """What to verify, and how."""

    url: httpx.URL
    cursor: int
    token: str | None
    keys: SourceKeys | None
    follow: bool
    cross_check: bool
    quiet_seconds: float
    retry_seconds: float
    tls: ssl.SSLContext
    #: Prints a line for the person at the terminal.
    say: Callable[[str], None]

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a WebSocket's handshake."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


class Report:
    """The outcome of one run. The run fills it."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.place = place_of(wanted.url)
        self.findings = Findings()
        self.continuity = Continuity(wanted.cursor, wanted.keys, self.findings)
        #: Why there is no second reading.
        self.not_compared = why_not(wanted)
        self.crosscheck: CrossCheck | None = None
        self.head: int | None = None
        self.interrupted = False

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return self.findings.total == 0

    @property
    def cut_short(self) -> bool:
        """Whether the run was interrupted before its end."""
        below = self.head is not None and self.continuity.position < self.head
        return self.interrupted and (below or not self.wanted.follow)

    def lines(self) -> Iterator[str]:
        """Yield the lines, without the verdict."""
        yield from (f"{name:<{NAME_COLUMNS}}{text}" for name, text in self._rows())

    def verdict(self) -> str:
        """Return the last line."""
        if self.sound and self.cut_short:
            return "nothing is wrong so far; it was interrupted"
        if self.sound:
            compared = self.crosscheck is not None and self.crosscheck.ended is None
            return "sound" if compared else "sound, as far as one reading tells"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.findings.counts.items())
        return f"wrong: {kinds}"

    def _rows(self) -> Iterator[tuple[str, str]]:
        seen = self.continuity
        yield "address", self.place
        yield "events", self._events()
        yield "holes", self._holes()
        yield "reconnects", str(seen.reconnects)
        for news in seen.news:
            yield "news", news
        yield "malformed", str(seen.malformed)
        yield "cross-check", self._crosscheck()
        yield "signatures", self._signatures()
        for source, counts in self._sources()[:SOURCES_SHOWN]:
            name = source if source == OTHER_SOURCES else shown(source).strip("'")
            text = ", ".join(f"{count} {verdict.value}" for verdict, count in counts if count)
            yield "", f"{name}: {text}"
        if (more := len(seen.signatures) - SOURCES_SHOWN) > 0:
            yield "", f"and {more} more sources"
        yield from self.findings.shown
        not_shown = self.findings.total - len(self.findings.shown)
        if not_shown > 0:
            yield "", f"and {not_shown} more"

    def _events(self) -> str:
        seen = self.continuity
        many = f"{seen.events}"
        if seen.labels != seen.events:
            many += f" with {seen.labels} labels"
        if seen.first is not None:
            many += f", seq {seen.first} to {seen.last}"
        head = "" if self.head is None else f"; the head was {self.head}"
        stopped = f"; interrupted at {seen.position}" if self.interrupted else ""
        return f"{many}{head}{stopped}"

    def _holes(self) -> str:
        seen, check = self.continuity, self.crosscheck
        if not seen.hole_count:
            return "0"
        text = f"{seen.hole_count}, {seen.hole_seqs} seqs in them"
        if any(name in self.wanted.url.params for name in FILTERS):
            text += " (the filter hides seqs, too)"
        if check is None:
            return text
        text += (
            f"; {'the first ' if seen.hole_count > HOLES_MAX else ''}{check.holes_read} read again"
        )
        return text + (f", then {check.holes_ended}" if check.holes_ended else "")

    def _crosscheck(self) -> str:
        check = self.crosscheck
        if check is None:
            return f"none: {self.not_compared}"
        text = f"{check.same} labels are the same in queryLabels"
        if check.gone:
            text += f", {check.gone} were deleted or replaced since"
        if check.ended is None:
            return text
        return f"none: {check.ended}" if not check.same else f"{text}; then {check.ended}"

    def _signatures(self) -> str:
        if self.wanted.keys is None:
            return "not checked, no --source-keys-file: all signatures count as unknown"
        totals = dict.fromkeys(Verdict, 0)
        for counts in self.continuity.signatures.values():
            for verdict, count in counts.items():
                totals[verdict] += count
        return ", ".join(f"{count} {verdict.value}" for verdict, count in totals.items())

    def _sources(self) -> list[tuple[str, list[tuple[Verdict, int]]]]:
        """Return the counts of each source, the source with the most labels first."""
        found = self.continuity.signatures.items()
        by_labels = sorted(found, key=lambda item: -sum(item[1].values()))
        return [(source, list(counts.items())) for source, counts in by_labels]

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        seen, check = self.continuity, self.crosscheck
        return {
            "url": self.place,
            "sound": self.sound,
            "interrupted": self.interrupted,
            "cursor": self.wanted.cursor,
            "position": seen.position,
            "head": self.head,
            "events": seen.events,
            "labels": seen.labels,
            "first": seen.first,
            "last": seen.last,
            "malformed": seen.malformed,
            "reconnects": seen.reconnects,
            "news": seen.news,
            "holes": {
                "count": seen.hole_count,
                "seqs": seen.hole_seqs,
                "read_again": 0 if check is None else check.holes_read,
                "ended": None if check is None else check.holes_ended,
            },
            "cross_check": {
                "same": 0 if check is None else check.same,
                "gone": 0 if check is None else check.gone,
                "ended": self.not_compared if check is None else check.ended,
            },
            "keys": self.wanted.keys is not None,
            "signatures": {
                source: {verdict.value: count for verdict, count in counts}
                for source, counts in self._sources()
            },
            "findings": [{"kind": kind, "text": text} for kind, text in self.findings.shown],
            "counts": dict(self.findings.counts),
        }


class Progress:
    """Prints the position from time to time."""

    def __init__(self, continuity: Continuity, say: Callable[[str], None]) -> None:
        self._continuity = continuity
        self._say = say
        self._position = continuity.position
        self._printed = self.advanced = time.monotonic()

    def silent_seconds(self) -> float:
        """Return how long the position has not moved. Prints the position when a line is due."""
        now = time.monotonic()
        if self._continuity.position != self._position:
            self._position = self._continuity.position
            self.advanced = now
        if now - self._printed > PROGRESS_SECONDS:
            self._printed = now
            self._say(f"read up to seq {self._position}")
        return now - self.advanced


def why_not(wanted: Wanted) -> str:
    """Return why there is no second reading. Empty: there is one."""
    if wanted.url.scheme in ("ws", "wss"):
        return "a WebSocket has no second reading"
    if not wanted.cross_check:
        return "--no-cross-check"
    if "snapshot" in wanted.url.params:
        return "a snapshot changes with the state"
    return ""
