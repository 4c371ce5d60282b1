"""The second reading: is what came all that there is, and is nothing in the holes.

Promises: the stream is compared with queryLabels page by page, so memory does not grow with it; a
label that one has and the other has not, below what both have passed, is found, unless it was
deleted or replaced meanwhile.
Does not belong here: HTTP (`queries`, `readings`).

queryLabels gives no seqs, but the cursor behind a page says how far it reaches: both readings have
the same labels up to there. Where they differ, both are read again before something is called lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from sse_labels.errors import SseLabelsError
from sse_labels.protocol.formats import shown
from sse_labels.verify.continuity import Event, Hole
from sse_labels.verify.findings import SHOWN_MAX, Findings, Kind

#: The most that queryLabels gives at once (its lexicon).
PAGE_LABELS = 250
#: Labels that queryLabels may have beyond those of the stream; then the rest is not compared.
MORE_MAX_LABELS = 1000
#: Answers to compare with one page of the stream; a filter that hides much makes many empty ones.
ANSWERS_MAX = 10_000
#: Pages that differ; after so many the rest is not compared any more.
DIFFERING_MAX_PAGES = SHOWN_MAX
#: Another process may be behind, and a row that was moved not yet settled: looked at again after
#: so many seconds each. Servers look at their table at least each second, unless told otherwise.
LOOKS_AFTER_SECONDS = (0.0, 0.25, 0.75, 2.0)


class NotCompared(SseLabelsError):
    """There is no second reading; the message says why."""


class QueryPage(NamedTuple):
    """One answer of queryLabels; it may hold few labels, or none, and a cursor all the same."""

    labels: Sequence[Any]
    #: The seq that it reaches up to; None where there is no more.
    cursor: int | None


class Again(NamedTuple):
    """A part of the stream, read again."""

    events: list[Event]
    #: False where rows may move to new ids, as in Ozone's table: the old one may still be in the
    #: server's memory.
    keeps_rows: bool


class CrossCheck:
    """Compares what the stream brings with queryLabels, as it comes."""

    def __init__(
        self,
        cursor: int,
        query: Callable[[int, int], QueryPage],
        again: Callable[[int, int], Again],
        findings: Findings,
        wait: Callable[[float], None],
    ) -> None:
        """`query(cursor, limit)` asks queryLabels, `again(cursor, until)` opens the stream once
        more; both raise NotCompared.
        """
        self._cursor = cursor
        self._query = query
        self._again = again
        self._findings = findings
        self._wait = wait
        self._held: list[Event] = []
        self._differing = 0
        #: Labels that both readings have.
        self.same = 0
        #: Labels of the stream that were deleted, or replaced by newer ones, since.
        self.gone = 0
        #: Why nothing more is compared.
        self.ended: str | None = None
        #: Holes that were read again, and why no more of them.
        self.holes_read = 0
        self.holes_ended: str | None = None

    def take(self, event: Event) -> None:
        """Take the next event."""
        if self.ended is None:
            self._held.append(event)

    def compare_when_full(self) -> None:
        """Compare what is held once it is a page."""
        if len(self._held) >= PAGE_LABELS:
            self.compare(self._held[-1].seq)

    def skip(self, floor: int) -> None:
        """Go on from the floor: what lies below may be deleted at any time."""
        if self._held:
            self.compare(self._held[-1].seq)
        self._cursor = max(self._cursor, floor - 1)

    def compare(self, until: int) -> None:
        """Compare what is held with all that queryLabels has up to `until`."""
        if self.ended is not None:
            return
        try:
            self._compare(until)
        except (NotCompared, RecursionError) as error:
            self.ended = str(error)
        self._held.clear()
        self._cursor = max(self._cursor, until)

    def _compare(self, until: int) -> None:
        found, end = self._labels(until, len(self._held))
        held = [event for event in self._held if event.seq <= end]
        if [event.label for event in held] != found:
            self._differ(held, end)
        else:
            self.same += len(held)
        if end < until:
            raise NotCompared(f"after seq {end} the rest was not compared: it differs by too much")
        if self._differing >= DIFFERING_MAX_PAGES:
            raise NotCompared(f"{self._differing} pages differ, the rest was not compared")

    def _labels(self, until: int, expected: int) -> tuple[list[Any], int]:
        """Return what queryLabels has up to `until`, or up to the seq that it returns."""
        found: list[Any] = []
        cursor = self._cursor
        for _ in range(ANSWERS_MAX):
            if cursor >= until or len(found) > expected + MORE_MAX_LABELS:
                return found, min(cursor, until)
            left = expected - len(found)
            page = self._query(cursor, min(left, PAGE_LABELS) if left > 0 else PAGE_LABELS)
            if page.cursor is None or page.cursor > until:
                later = self._next(until, len(page.labels))
                return [*found, *labels_before(later, page.labels)], until
            found += page.labels
            cursor = page.cursor
        raise NotCompared(f"queryLabels did not get to seq {until} in {ANSWERS_MAX} answers")

    def _next(self, cursor: int, count: int) -> list[Any]:
        """Return `count` labels after `cursor`, fewer only at the end."""
        found: list[Any] = []
        for _ in range(ANSWERS_MAX):
            if len(found) >= count:
                break
            page = self._query(cursor, PAGE_LABELS)
            found += page.labels
            if page.cursor is None:
                break
            cursor = page.cursor
        return found

    def _differ(self, held: Sequence[Event], until: int) -> None:
        """Read both again, more than once, before something is missing."""
        for seconds in LOOKS_AFTER_SECONDS:
            self._wait(seconds)
            again = self._again(self._cursor, until)
            found, _ = self._labels(until, len(held))
            outcome = Outcome(held, again.events, found)
            missing = outcome.missing if again.keeps_rows else []
            # What the query has and the stream has not will not come any more.
            if not missing or self._findings.total > SHOWN_MAX:
                break
        self.same += outcome.same
        self.gone += len(outcome.gone) + len(outcome.missing) - len(missing)
        wrong: list[tuple[Kind, tuple[int | None, Any], str]] = [
            *((Kind.LOST, event, "lost by the stream, queryLabels has it")
              for event in outcome.lost),
            *((Kind.LOST, event, "lost by queryLabels, the stream had it") for event in missing),
            *((Kind.ALTERED, event, "queryLabels has it, the stream had another label")
              for event in outcome.altered),
        ]  # fmt: skip
        for kind, event, text in wrong:
            self._findings.add(kind, f"{named(event)}: {text}")
        self._differing += bool(wrong)

    def read_holes(self, holes: Sequence[Hole]) -> None:
        """Open the stream before each hole, and see that nothing is in it."""
        for hole in holes:
            try:
                found = self._again(hole.after, hole.until).events
            except NotCompared as error:
                self.holes_ended = str(error)
                return
            self.holes_read += 1
            for event in found:
                text = f"{named(event)}: lost by the first reading, the second has it"
                self._findings.add(Kind.LOST, text)


class Outcome:
    """How the stream, read twice, and queryLabels differ in one page."""

    def __init__(self, held: Sequence[Event], again: Sequence[Event], found: Sequence[Any]) -> None:
        self.same = 0
        #: In queryLabels alone, in the stream alone, and different in both.
        self.lost: list[tuple[int | None, Any]] = []
        self.missing: list[Event] = []
        self.altered: list[Event] = []
        self._again = dict(again)
        #: What the stream does not have any more.
        self.gone = [event for event in held if event.seq not in self._again]
        # What the first reading of it had not.
        self._more = [e for e in again if e.seq not in {event.seq for event in held}]
        kept = [event for event in held if event.seq in self._again]
        texts = [_text(event.label) for event in kept], [_text(label) for label in found]
        opcodes = SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
        for tag, begin, end, query_begin, query_end in opcodes:
            if tag == "equal":
                self.same += end - begin
            else:
                self._differ(kept[begin:end], list(found[query_begin:query_end]))

    def _differ(self, ours: Sequence[Event], theirs: list[Any]) -> None:
        for event in ours:
            now = self._again[event.seq]
            for label in theirs:
                is_same = signed_since(event.label, label)
                if is_same or label == now:
                    theirs.remove(label)
                    self.same += is_same
                    self.altered += [] if is_same else [Event(event.seq, label)]
                    break
            else:
                self.missing.append(event)
        for label in theirs:
            # Another process may not have heard yet that it is deleted.
            if _taken(self.gone, label) is not None:
                self.same += 1
            else:
                self.lost.append(_taken(self._more, label) or (None, label))


def _taken(events: list[Event], label: Any) -> Event | None:
    """Take out the first event with this label."""
    for event in events:
        if event.label == label:
            events.remove(event)
            return event
    return None


def labels_before(later: Sequence[Any], labels: Sequence[Any]) -> Sequence[Any]:
    """Return the labels of a page without those at its end that `later` begins with."""
    for count in range(len(labels)):
        if labels[count:] == later[: len(labels) - count]:
            return labels[:count]
    return labels


def signed_since(before: Any, after: Any) -> bool:
    """Say whether a label only got its signature in between: Ozone may sign later, in place."""
    if not isinstance(before, dict) or not isinstance(after, dict) or "sig" in before:
        return False
    # A negation that is false is written only beside a signature that covers it.
    without = {
        name: value
        for name, value in after.items()
        if name != "sig" and not (name == "neg" and value is False)
    }
    return before == without


def named(event: tuple[int | None, Any]) -> str:
    """Return how a finding names an event; queryLabels does not tell the seq."""
    seq, label = event
    what = ""
    if isinstance(label, dict) and "uri" in label:
        what = f" ({shown(label.get('val'))} of {shown(label['uri'])})"
    return f"{'a label' if seq is None else f'seq {seq}'}{what}"


def _text(label: Any) -> str:
    return json.dumps(label, sort_keys=True)
