"""The second reading: checks that the stream brought every label, and that holes are empty.

Promises: the stream is compared with queryLabels page by page, so memory does not grow with the
stream. Up to the seq that both have passed, a label that only one of them has is found, unless the
label was deleted or replaced meanwhile.
Does not belong here: HTTP (`queries`, `stream`).

queryLabels returns no seqs, but the cursor of a page is the seq up to which the page reaches. Up to
that seq both must have the same labels. If they differ, both are read again before a label counts
as lost.
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

#: The most labels in one answer of queryLabels (its lexicon).
PAGE_LABELS = 250
#: How many more labels than the stream queryLabels may have. Above this the rest is not compared.
MORE_MAX_LABELS = 1000
#: The most answers for one page of the stream. With a strict filter many answers are empty.
ANSWERS_MAX = 10_000
#: After this many differing pages the rest is not compared.
DIFFERING_MAX_PAGES = SHOWN_MAX
#: The waits before each new reading of a differing page. Another process may be behind, and a
#: moved row may not be settled yet. By default a server reads its table at least once a second.
LOOKS_AFTER_SECONDS = (0.0, 0.25, 0.75, 2.0)


class NotCompared(SseLabelsError):
    """The second reading is not possible. The message is the reason."""


class QueryPage(NamedTuple):
    """One answer of queryLabels. It may have few labels, or none, and still a cursor."""

    labels: Sequence[Any]
    #: The seq up to which the answer reaches. None: it is the last one.
    cursor: int | None


class Again(NamedTuple):
    """A part of the stream that was read again."""

    events: list[Event]
    #: False: rows may move to new ids, as in Ozone's table. Then the server's memory may still
    #: hold the event with the old id.
    keeps_rows: bool


class CrossCheck:
    """Compares the events of a stream with queryLabels, page by page."""

    def __init__(
        self,
        cursor: int,
        query: Callable[[int, int], QueryPage],
        again: Callable[[int, int], Again],
        findings: Findings,
        wait: Callable[[float], None],
    ) -> None:
        """`query(cursor, limit)` asks queryLabels. `again(cursor, until)` reads the stream again.

        Both raise NotCompared.
        """
        self._cursor = cursor
        self._query = query
        self._again = again
        self._findings = findings
        self._wait = wait
        self._held: list[Event] = []
        self._differing = 0
        #: The number of labels that both have.
        self.same = 0
        #: The number of labels that were deleted or replaced after the stream had sent them.
        self.gone = 0
        #: The reason why the comparison stopped.
        self.ended: str | None = None
        #: The number of holes that were read again, and the reason why no more are read.
        self.holes_read = 0
        self.holes_ended: str | None = None

    def take(self, event: Event) -> None:
        """Keep the next event until its page is compared."""
        if self.ended is None:
            self._held.append(event)

    def compare_when_full(self) -> None:
        """Compare the kept events when they fill a page."""
        if len(self._held) >= PAGE_LABELS:
            self.compare(self._held[-1].seq)

    def skip(self, floor: int) -> None:
        """Continue from the floor: labels below the floor may be deleted at any time."""
        if self._held:
            self.compare(self._held[-1].seq)
        self._cursor = max(self._cursor, floor - 1)

    def compare(self, until: int) -> None:
        """Compare the kept events with all labels of queryLabels up to `until`."""
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
        """Return the labels of queryLabels, and the seq up to which they reach, at most `until`."""
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
        """Return at least `count` labels after `cursor`, or all that exist."""
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
        """Read both again, up to several times, before a label counts as lost."""
        for seconds in LOOKS_AFTER_SECONDS:
            self._wait(seconds)
            again = self._again(self._cursor, until)
            found, _ = self._labels(until, len(held))
            outcome = Outcome(held, again.events, found)
            missing = outcome.missing if again.keeps_rows else []
            # Waiting helps only queryLabels. The stream does not send a lost label later.
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
        """Read the stream again in each hole, and check that the hole is empty."""
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
    """The differences between the stream, which was read twice, and queryLabels in one page."""

    def __init__(self, held: Sequence[Event], again: Sequence[Event], found: Sequence[Any]) -> None:
        self.same = 0
        #: Labels only in queryLabels, events only in the stream, and events that differ.
        self.lost: list[tuple[int | None, Any]] = []
        self.missing: list[Event] = []
        self.altered: list[Event] = []
        self._again = dict(again)
        #: Events that the stream no longer has.
        self.gone = [event for event in held if event.seq not in self._again]
        # Events that only the second reading of the stream has.
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
            # Another process may not know yet that the label is deleted.
            if _taken(self.gone, label) is not None:
                self.same += 1
            else:
                self.lost.append(_taken(self._more, label) or (None, label))


def _taken(events: list[Event], label: Any) -> Event | None:
    """Remove and return the first event with this label. None: there is no such event."""
    for event in events:
        if event.label == label:
            events.remove(event)
            return event
    return None


def labels_before(later: Sequence[Any], labels: Sequence[Any]) -> Sequence[Any]:
    """Return the labels of a page without its last labels, if `later` begins with these."""
    for count in range(len(labels)):
        if labels[count:] == later[: len(labels) - count]:
            return labels[:count]
    return labels


def signed_since(before: Any, after: Any) -> bool:
    """Return whether `after` is `before` with a signature: Ozone may sign a stored row later."""
    if not isinstance(before, dict) or not isinstance(after, dict) or "sig" in before:
        return False
    # `neg: false` is written only in a label whose signature covers it.
    without = {
        name: value
        for name, value in after.items()
        if name != "sig" and not (name == "neg" and value is False)
    }
    return before == without


def named(event: tuple[int | None, Any]) -> str:
    """Return the name of an event in a finding. A label of queryLabels has no seq."""
    seq, label = event
    what = ""
    if isinstance(label, dict) and "uri" in label:
        what = f" ({shown(label.get('val'))} of {shown(label['uri'])})"
    return f"{'a label' if seq is None else f'seq {seq}'}{what}"


def _text(label: Any) -> str:
    return json.dumps(label, sort_keys=True)
