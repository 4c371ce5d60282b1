"""The verdict: compares every transcript with the table, and makes the report.

The table is the truth. A consumer must have received each row after its start that passes its
filter: once, in increasing order of seq, with the row's content.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: The expected event of each row, as JSON: {"seq": …, "labels": [{…}]}.
Truth = Mapping[int, dict[str, Any]]


class Entry(NamedTuple):
    """One event as a consumer received it: its id, and its data as text."""

    seq: int
    data: str


@dataclass
class Findings:
    """The errors of one transcript, as lists of seqs; all are empty when it is right."""

    who: str
    expected: int = 0
    lost: list[int] = field(default_factory=list)
    duplicated: list[int] = field(default_factory=list)
    out_of_order: list[int] = field(default_factory=list)
    altered: list[int] = field(default_factory=list)
    #: Labels that the filter should hide, or that were never stored.
    unexpected: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(
            (self.lost, self.duplicated, self.out_of_order, self.altered, self.unexpected),
        )

    def __str__(self) -> str:
        wrong = {
            name: getattr(self, name)
            for name in ("lost", "duplicated", "out_of_order", "altered", "unexpected")
        }
        return f"{self.who}: " + ", ".join(
            f"{len(seqs)} {name} {seqs[:8]}" for name, seqs in wrong.items() if seqs
        )


def judge(
    who: str,
    transcript: Iterable[Entry],
    truth: Truth,
    *,
    start: int = 0,
    passes: Callable[[dict[str, Any]], bool] = lambda label: True,
) -> Findings:
    """Compare the events of one consumer with the rows of the table."""
    expected = {seq for seq, event in truth.items() if seq > start and passes(event["labels"][0])}
    findings = Findings(who, len(expected))
    seen: set[int] = set()
    newest = start
    for seq, data in transcript:
        if seq in seen:
            findings.duplicated.append(seq)
        elif seq < newest:
            findings.out_of_order.append(seq)
        if seq not in expected:
            findings.unexpected.append(seq)
        elif _parsed(data) != truth[seq]:
            findings.altered.append(seq)
        seen.add(seq)
        newest = max(newest, seq)
    findings.lost = sorted(expected - seen)
    return findings


def _parsed(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@dataclass
class Published:
    """One publish request; it was repeated with the same key until an answer or the end."""

    key: str
    uris: list[str]
    #: The seqs of the 201; None while unanswered.
    seqs: list[int] | None = None
    tries: int = 0


def judge_published(requests: Iterable[Published], truth: Truth) -> list[str]:
    """Return errors: an answered label is missing, a key stored twice, or only some labels."""
    stored: defaultdict[str, list[int]] = defaultdict(list)
    for seq, event in truth.items():
        stored[event["labels"][0]["uri"]].append(seq)
    wrong = []
    for request in requests:
        found = [stored.get(uri, []) for uri in request.uris]
        counts = {len(seqs) for seqs in found}
        if request.seqs is None:
            if counts not in ({0}, {1}):
                wrong.append(f"{request.key}, unanswered, is stored as {found}")
        elif found != [[seq] for seq in request.seqs]:
            wrong.append(f"{request.key}, answered {request.seqs}, is stored as {found}")
    return wrong


@dataclass
class Injection:
    """One fault: the seqs between which it happened, and the time until all consumers went on."""

    fault: str
    first: int
    last: int
    labels: int
    recovery_seconds: float


@dataclass
class Verdict:
    """The result of one run."""

    seed: str
    findings: list[Findings]
    #: Answers and events that must not happen at all, and wrong publishes.
    complaints: list[str]
    labels: int
    delivered: int
    injections: list[Injection]

    @property
    def clean(self) -> bool:
        """Whether there is no error."""
        return not self.complaints and not any(self.findings)

    def __str__(self) -> str:
        wrong = [str(one) for one in self.findings if one] + self.complaints[:20]
        return "\n".join([f"SSE_LABELS_TEST_SEED={self.seed}", *wrong, table(self.rows())])

    def rows(self) -> list[Row]:
        """The report's rows: one per fault, and one for the time between faults."""
        rows: dict[str, Row] = {}
        wrong = {
            name: Counter(seq for one in self.findings for seq in getattr(one, name))
            for name in ("lost", "duplicated", "out_of_order")
        }
        left = {name: sum(seqs.values()) for name, seqs in wrong.items()}
        for injection in self.injections:
            row = rows.setdefault(injection.fault, Row(injection.fault))
            row.times += 1
            row.labels += injection.labels
            row.seconds = max(row.seconds, injection.recovery_seconds)
            for name, seqs in wrong.items():
                here = sum(
                    count for seq, count in seqs.items() if injection.first < seq <= injection.last
                )
                setattr(row, name, getattr(row, name) + here)
                left[name] -= here
        rest = Row("(between faults)", labels=self.labels - sum(i.labels for i in self.injections))
        rest.lost, rest.duplicated = left["lost"], left["duplicated"]
        rest.out_of_order = left["out_of_order"]
        return [*rows.values(), rest]


@dataclass
class Row:
    """One line of the report; errors are counted over all consumers."""

    fault: str
    times: int = 0
    labels: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    #: The longest time from the fault's end until every prompt consumer had a newer label.
    seconds: float = 0.0


def table(rows: Sequence[Row]) -> str:
    """The report as text."""
    head = ("fault", "times", "labels", "lost", "duplicated", "out of order", "s to recover")
    lines = [head] + [
        (
            row.fault,
            *(str(n) for n in (row.times, row.labels, row.lost, row.duplicated, row.out_of_order)),
            f"{row.seconds:.2f}" if row.times else "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
