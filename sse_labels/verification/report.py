"""What was read and what was found, for a person and for a machine.

Promises: a few aligned lines, or one object; no line is longer for a longer stream, and whatever
a server sent is printable.
Does not belong here: judging; where it is printed (`cli.verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sse_labels.formats import shown
from sse_labels.signatures import Verdict
from sse_labels.verification.continuity import HOLES_MAX, OTHER_SOURCES, Continuity
from sse_labels.verification.crosscheck import CrossCheck
from sse_labels.verification.findings import Findings

#: As wide as the longest name of a line.
NAME_COLUMNS = 13
#: Sources that are shown in lines; in JSON are more.
SOURCES_SHOWN = 20


@dataclass
class Report:
    """The outcome of one run."""

    place: str
    cursor: int
    #: Whether a filter hides labels, which leaves holes.
    filtered: bool
    #: Whether keys were given.
    has_keys: bool
    #: Whether it was to go on after the head, until it is interrupted.
    follow: bool
    continuity: Continuity
    findings: Findings
    #: Why there is no second reading.
    not_compared: str
    crosscheck: CrossCheck | None = None
    head: int | None = None
    interrupted: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return self.findings.total == 0

    @property
    def cut_short(self) -> bool:
        """Whether it was interrupted before it had read what it was to read."""
        below = self.head is not None and self.continuity.position < self.head
        return self.interrupted and (below or not self.follow)

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
            words = ", ".join(f"{count} {verdict.value}" for verdict, count in counts if count)
            yield "", f"{name}: {words}"
        if (more := len(seen.signatures) - SOURCES_SHOWN) > 0:
            yield "", f"and {more} more sources"
        yield from self.findings.shown
        told = self.findings.total - len(self.findings.shown)
        if told > 0:
            yield "", f"and {told} more"

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
        holes = self.continuity.holes
        if not holes.count:
            return "0"
        text = f"{holes.count}, {holes.seqs} seqs in them"
        if self.filtered:
            text += " (the filter hides seqs, too)"
        check = self.crosscheck
        if check is None:
            return text
        text += f"; {check.holes_read} read again"
        if holes.count > HOLES_MAX:
            text += ", the first and the last"
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
        if not self.has_keys:
            return "not checked, no --source-keys-file: those that are there count as unknown"
        totals = dict.fromkeys(Verdict, 0)
        for counts in self.continuity.signatures.values():
            for verdict, count in counts.items():
                totals[verdict] += count
        return ", ".join(f"{count} {verdict.value}" for verdict, count in totals.items())

    def _sources(self) -> list[tuple[str, list[tuple[Verdict, int]]]]:
        """Return the counts of each source, those with the most labels first."""
        found = self.continuity.signatures.items()
        by_labels = sorted(found, key=lambda item: -sum(item[1].values()))
        return [(source, list(counts.items())) for source, counts in by_labels]

    def as_json(self) -> dict[str, Any]:
        """Return all of it as one object."""
        seen, check = self.continuity, self.crosscheck
        return {
            "url": self.place,
            "sound": self.sound,
            "interrupted": self.interrupted,
            "cursor": self.cursor,
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
                "count": seen.holes.count,
                "seqs": seen.holes.seqs,
                "read_again": 0 if check is None else check.holes_read,
                "ended": None if check is None else check.holes_ended,
            },
            "cross_check": {
                "same": 0 if check is None else check.same,
                "gone": 0 if check is None else check.gone,
                "ended": self.not_compared if check is None else check.ended,
            },
            "keys": self.has_keys,
            "signatures": {
                source: {verdict.value: count for verdict, count in counts}
                for source, counts in self._sources()
            },
            "findings": [{"kind": kind, "text": text} for kind, text in self.findings.shown],
            "counts": dict(self.findings.counts),
        }
