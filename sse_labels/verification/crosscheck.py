"""The second reading: is what came all that there is, and is nothing in the holes.

Promises: both readings are walked in step, a page of each at a time, so memory does not grow with
the stream; a label that one has and the other has not, below what both have passed, is found,
unless its row was moved or deleted in between.
Stands behind the first reading (`continuity`); it asks through what it is given.
Does not belong here: HTTP (`queries`, `second_reading`).

queryLabels gives no seqs, but the cursor behind each page is that of its last label. So a page
that differs is read again one label at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

from sse_labels.errors import SseLabelsError
from sse_labels.formats import shown
from sse_labels.verification.continuity import Event, Hole
from sse_labels.verification.findings import SHOWN_MAX, Findings, Kind

#: The most that queryLabels gives at once (its lexicon).
PAGE_LABELS = 250
#: Labels that are read one at a time, where a page of the stream leaves many out.
WALK_MAX_LABELS = 1000
#: Pages that differ; after so many the rest is not compared any more.
DIFFERING_MAX_PAGES = SHOWN_MAX
#: Another process may be behind, and a row that was moved not yet settled: looked at again after
#: so many seconds each. Servers look at their table at least each second, unless told otherwise.
LOOKS_AFTER_SECONDS = (0.25, 0.75, 2.0)


class NotCompared(SseLabelsError):
    """There is no second reading; the message says why."""


class Page(NamedTuple):
    """One answer of queryLabels."""

    labels: Sequence[Any]
    #: The seq of the last of them while there are more.
    cursor: int | None


class Fate(Enum):
    """What became of an event, by the stream itself."""

    THERE = "there"
    #: A newer event of its key is there: Ozone moves a row that it changes to a new id.
    REPLACED = "replaced"
    #: It lies below the floor: retention deleted it.
    EXPIRED = "expired"
    GONE = "gone"


class Again(Protocol):
    """The stream, opened once more."""

    def after(self, cursor: int, until: int) -> list[Event]:
        """Return the events in `(cursor, until]`; raise NotCompared."""

    def fate(self, event: Event) -> Fate:
        """Say what became of an event; raise NotCompared."""


class CrossCheck:
    """Compares what the stream brings with queryLabels, as it comes."""

    def __init__(
        self,
        cursor: int,
        query: Callable[[int, int], Page],
        again: Again,
        findings: Findings,
        wait: Callable[[float], None],
    ) -> None:
        """`query(cursor, limit)` returns at most `limit` labels after `cursor`, or raises."""
        self._cursor = cursor
        self._query = query
        self._again = again
        self._findings = findings
        self._wait = wait
        self._held: list[Event] = []
        self._differing = 0
        #: Labels that both readings have.
        self.same = 0
        #: Events that were gone by the second reading, for a newer one or by retention.
        self.replaced = 0
        self.expired = 0
        #: Why nothing more is compared.
        self.ended: str | None = None

    def take(self, event: Event) -> None:
        """Take the next event; compare when there is a page of them."""
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
        """Compare what is held with all that the second reading has up to `until`."""
        if self.ended is not None:
            return
        try:
            same = self._same_page()
            if same < len(self._held) or until > self._end(same):
                self._differ(same, until)
            else:
                self.same += same
        except NotCompared as error:
            self.ended = str(error)
        self._held.clear()
        self._cursor = max(self._cursor, until)

    def _end(self, same: int) -> int:
        """Return the seq up to which the first `same` events reach."""
        return self._held[same - 1].seq if same else self._cursor

    def _same_page(self) -> int:
        """Return how many of the events that are held a page of the second reading begins with."""
        if not self._held:
            return 0
        page = self._query(self._cursor, len(self._held))
        same = 0
        for event, label in zip(self._held, page.labels, strict=False):
            if event.label != label:
                break
            same += 1
        # The same labels under other seqs: one of several that are alike is missing.
        if page.labels and page.cursor not in (None, self._held[len(page.labels) - 1].seq):
            return 0
        return same

    def _differ(self, same: int, until: int) -> None:
        """Compare one label at a time; look more than once before something is missing."""
        for seconds in (*LOOKS_AFTER_SECONDS, None):
            found = self._walk(self._end(same), until)
            too_many = len(found) == WALK_MAX_LABELS
            end = found[-1].seq if too_many else until
            outcome = self._outcome([e for e in self._held[same:] if e.seq <= end], found)
            # What the query has and the stream has not will not come any more.
            if not outcome.missing or seconds is None or self._findings.total > SHOWN_MAX:
                break
            self._wait(seconds)
        self.same += same + outcome.same
        self.replaced += outcome.replaced
        self.expired += outcome.expired
        for kind, text in outcome.wrong():
            self._findings.add(kind, text)
        self._differing += bool(outcome.missing or outcome.lost or outcome.altered)
        if self._differing >= DIFFERING_MAX_PAGES:
            self.ended = f"{self._differing} pages differ, the rest was not compared"
        elif too_many:
            self.ended = f"after seq {end} the rest was not compared: it differs by too much"

    def _walk(self, cursor: int, until: int) -> list[Event]:
        """Return the second reading of `(cursor, until]` with its seqs, or the first part."""
        found: list[Event] = []
        while cursor < until and len(found) < WALK_MAX_LABELS:
            page = self._query(cursor, 1)
            if page.labels:
                label = page.labels[0]
                last = page.cursor is None
                seq = self._seq_of_last(label, cursor, until) if last else page.cursor
                if seq is None or seq > until:
                    break
                found.append(Event(seq, label))
            if page.cursor is None:
                break
            cursor = page.cursor
        return found

    def _seq_of_last(self, label: Any, cursor: int, until: int) -> int | None:
        """Return the seq of the last label that there is, None when it is beyond `until`.

        Behind it is no cursor. So it is looked for: from which cursor on does it not come?
        """
        low, high = cursor, until + 1
        while high - low > 1:
            middle = (low + high) // 2
            if list(self._query(middle, 1).labels) == [label]:
                low = middle
            else:
                high = middle
        return None if high > until else high

    def _outcome(self, held: Sequence[Event], found: Sequence[Event]) -> Outcome:
        first, second = dict(held), dict(found)
        outcome = Outcome()
        for seq, label in second.items():
            if seq not in first:
                outcome.lost.append(Event(seq, label))
            elif first[seq] == label or signed_since(first[seq], label):
                outcome.same += 1
            else:
                outcome.altered.append(Event(seq, label))
        for event in held:
            if event.seq in second:
                continue
            fate = self._again.fate(event)
            if fate is Fate.REPLACED:
                outcome.replaced += 1
            elif fate is Fate.EXPIRED:
                outcome.expired += 1
            else:
                outcome.missing.append(event)
        return outcome


class Outcome:
    """How two readings of one page differ."""

    def __init__(self) -> None:
        self.same = self.replaced = self.expired = 0
        #: In the second alone, in the first alone, and different in both.
        self.lost: list[Event] = []
        self.missing: list[Event] = []
        self.altered: list[Event] = []

    def wrong(self) -> list[tuple[Kind, str]]:
        """Return the findings."""
        return [
            *((Kind.LOST, f"{named(event)}: lost by the stream, queryLabels has it")
              for event in self.lost),
            *((Kind.LOST, f"{named(event)}: lost by queryLabels, the stream had it")
              for event in self.missing),
            *((Kind.ALTERED, f"{named(event)}: queryLabels has it, the stream had another label")
              for event in self.altered),
        ]  # fmt: skip


class HoleCheck:
    """Reads the holes of the first reading again."""

    def __init__(self, again: Again, findings: Findings, wait: Callable[[float], None]) -> None:
        self._again = again
        self._findings = findings
        self._wait = wait
        #: Holes that were read again.
        self.read = 0
        self.ended: str | None = None

    def run(self, holes: Sequence[Hole]) -> None:
        """Open the stream before each hole, and see what comes up to the event behind it."""
        for hole in holes:
            try:
                self._look(hole)
            except NotCompared as error:
                self.ended = str(error)
                return
            self.read += 1

    def _look(self, hole: Hole) -> None:
        following = hole.following
        until = hole.until if following is None else following.seq
        found = self._again.after(hole.after, until)
        for event in found:
            if event.seq <= hole.until:
                text = f"{named(event)}: lost by the first reading, the second has it"
                self._findings.add(Kind.LOST, text)
        if following is None or any(event.seq <= hole.until for event in found):
            return
        behind = [event.label for event in found if event.seq == following.seq]
        if not behind:
            if self._is_gone(following):
                text = f"{named(following)}: lost by the second reading, the first has it"
                self._findings.add(Kind.LOST, text)
        elif behind[0] != following.label and not signed_since(following.label, behind[0]):
            text = f"{named(following)}: the second reading has another label"
            self._findings.add(Kind.ALTERED, text)

    def _is_gone(self, event: Event) -> bool:
        """Say whether an event is missing without a reason; look more than once before."""
        for seconds in (*LOOKS_AFTER_SECONDS, None):
            if self._again.fate(event) in (Fate.REPLACED, Fate.EXPIRED):
                return False
            if seconds is not None:
                self._wait(seconds)
        return True


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


def key_of(label: Any) -> tuple[Any, ...] | None:
    """Return what makes two labels the same one for Ozone; None for what is no label."""
    if not isinstance(label, dict):
        return None
    key = (label.get("src"), label.get("uri"), label.get("cid", ""), label.get("val"))
    return key if all(isinstance(part, str) for part in key) else None


def named(event: Event) -> str:
    """Return how a finding names an event."""
    key = key_of(event.label)
    what = "" if key is None else f" ({shown(key[3])} of {shown(key[1])})"
    return f"seq {event.seq}{what}"
