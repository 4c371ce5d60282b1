"""The settled rule: decides which rows may be streamed, so that no row is ever skipped.

Promises: a row is admitted only when no open transaction can still insert a smaller id. The rule is
pure: it gets ids and lock holders, never a database. So tests can try every order of events. The
rule's queries stand in `sql/queries/follow.sql`.

Ids come from a sequence, and transactions may commit in another order than they took their ids.
`nextval` takes a RowExclusiveLock on the sequence before it returns a number. The transaction holds
the lock until it ends. So:

- A page that continues the head without a hole is settled. No other query is needed.
- When a page has a hole, the rule remembers `hi`, the last id seen. After that it remembers W, the
  transactions that hold the lock. A transaction with an id below `hi` took the id before `hi` was
  visible. So the transaction is in W, or it has ended and a NEW statement sees its rows.
- While W is not empty, only the ids before the hole are admitted. Transactions leave W and never
  join it: later transactions take ids above `hi`.
- When W is empty, all ids up to `hi` are final, holes included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from sse_labels.errors import BrokenPromise

#: A hole is logged when it has been open for this time, and again each time its age doubles.
HOLE_LOG_SECONDS = 5.0


class SettledRule:
    """Decides how much of each page is settled, and keeps the head.

    `head` is the newest settled seq: no new row can appear at or below it.
    """

    def __init__(self, head: int, clock: Callable[[], float]) -> None:
        self.head = head
        self.hole: Hole | None = None
        #: Holes up to this seq are final. Not below the head when a hole was just settled.
        self._settled_through = head
        self._clock = clock

    def open_hole(self, hi: int, holders: Iterable[str]) -> None:
        """Remember a hole below `hi`; `holders` must have been read after `hi` was seen."""
        self.hole = Hole(hi, frozenset(holders), self._clock())
        self._settle_when_empty()

    def drop_ended(self, holders: Iterable[str]) -> None:
        """Remove from W all transactions that are not in `holders`: they have ended."""
        if self.hole is not None:
            self.hole.waiting &= frozenset(holders)
            self._settle_when_empty()

    def renew(self, holders: Iterable[str]) -> None:
        """Replace W by the current `holders`.

        Needed after a reconnect: after a crash of the database, a prepared transaction has another
        virtual transaction id, and would seem to have ended.
        """
        if self.hole is not None:
            self.hole.waiting = frozenset(holders)
            self._settle_when_empty()

    def admit(self, ids: Sequence[int], *, complete: bool) -> tuple[int, int]:
        """Return how many of `ids` are settled, and the head once they are published.

        `ids` are all visible ids above the head, increasing. `complete` says that the limit did not
        cut the page off. Only `publish` moves the head.
        """
        for before, after in pairwise([self.head, *ids]):
            if after <= before:
                raise BrokenPromise(f"ids must increase: {after} came after {before}")
        expected = self.head
        taken = 0
        for seq in ids:
            if seq > self._settled_through and seq != max(expected, self._settled_through) + 1:
                break
            expected = seq
            taken += 1
        if taken < len(ids) or complete:
            # All ids up to _settled_through were taken: the holes at its end are final too.
            expected = max(expected, self._settled_through)
        return taken, expected

    def publish(self, head: int) -> None:
        """Move the head to what `admit` returned."""
        if head < self.head:
            raise BrokenPromise(f"the head cannot go back from {self.head} to {head}")
        self.head = head
        if self.hole is not None and head >= self.hole.hi:
            # The missing ids have appeared. Transactions that still hold the lock do not matter.
            self.hole = None

    def _settle_when_empty(self) -> None:
        if self.hole is not None and not self.hole.waiting:
            self._settled_through = max(self._settled_through, self.hole.hi)
            self.hole = None


class Hole:
    """Missing ids below `hi`, and the transactions that may still insert them."""

    __slots__ = ("hi", "log_after", "since", "waiting")

    def __init__(self, hi: int, waiting: frozenset[str], since: float) -> None:
        self.hi = hi
        self.waiting = waiting
        self.since = since
        #: The hole is logged when it is this old, in seconds. Doubled each time.
        self.log_after = HOLE_LOG_SECONDS
