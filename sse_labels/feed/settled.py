"""The settled rule: which rows may be streamed without ever skipping one.

Promises: a row is admitted only when no open transaction can still bring a
smaller id. Pure: it sees ids and lock holders, never a database, so that every
order of events can be tried on it.
Stands inside the sequencer's room, as its judgement.
Does not belong here: SQL (the rule's queries stand in `sql/queries/follow.sql`).

Ids come from a sequence, and transactions commit in another order than they
took their ids. `nextval` takes a RowExclusiveLock on the sequence before it
hands out a number, and holds it until the transaction ends. So:

- A page that continues the head without a hole is settled; no further query.
- A hole: remember `hi`, the last id seen, and then W, the transactions that
  hold that lock. Whoever took an id below `hi` took it before `hi` was visible,
  so it is in W, or it has ended and a NEW statement sees what it left.
- While W is not empty only the contiguous prefix is admitted. Transactions
  leave W and never join it: later ones take ids above `hi`.
- When W is empty, everything up to `hi` is final, holes included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from sse_labels.errors import BrokenPromise

#: A hole is logged when it has been open this long, and again each time that doubles.
HOLE_LOG_SECONDS = 5.0


class SettledRule:
    """Decides how much of each page is settled, and where the head stands.

    `head` is the newest settled seq: nothing at or below it can still appear.
    """

    def __init__(self, head: int, clock: Callable[[], float]) -> None:
        self.head = head
        self.hole: Hole | None = None
        #: Up to here holes are final; never below head when a hole was just settled.
        self._settled_through = head
        self._clock = clock

    def open_hole(self, hi: int, holders: Iterable[str]) -> None:
        """Remember a hole below `hi`; `holders` must have been read after `hi` was seen."""
        self.hole = Hole(hi, frozenset(holders), self._clock())
        self._settle_when_empty()

    def drop_ended(self, holders: Iterable[str]) -> None:
        """Take note of who holds the lock now: whoever of W does not has ended."""
        if self.hole is not None:
            self.hole.waiting &= frozenset(holders)
            self._settle_when_empty()

    def renew(self, holders: Iterable[str]) -> None:
        """Wait for all of today's holders instead of yesterday's.

        Needed after a reconnect: across a crash a prepared transaction comes back
        under another virtual transaction id, and would seem to have ended.
        """
        if self.hole is not None:
            self.hole.waiting = frozenset(holders)
            self._settle_when_empty()

    def admit(self, ids: Sequence[int], *, complete: bool) -> tuple[int, int]:
        """Return how many of `ids` are settled, and the head once they are published.

        `ids` are all visible ids above the head, increasing; `complete` says that
        the page was not cut off by its limit. The head moves only by `publish`.
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
            # Nothing up to settled_through was left behind: the holes at its end are final too.
            expected = max(expected, self._settled_through)
        return taken, expected

    def publish(self, head: int) -> None:
        """Move the head to what `admit` returned."""
        if head < self.head:
            raise BrokenPromise(f"the head cannot go back from {self.head} to {head}")
        self.head = head
        if self.hole is not None and head >= self.hole.hi:
            # What was missing has come: whoever still holds the lock keeps nobody waiting.
            self.hole = None

    def _settle_when_empty(self) -> None:
        if self.hole is not None and not self.hole.waiting:
            self._settled_through = max(self._settled_through, self.hole.hi)
            self.hole = None


class Hole:
    """Ids below `hi` that are missing, and the transactions that may still bring them."""

    __slots__ = ("hi", "log_after", "since", "waiting")

    def __init__(self, hi: int, waiting: frozenset[str], since: float) -> None:
        self.hi = hi
        self.waiting = waiting
        self.since = since
        #: Seconds of waiting after which it is logged; doubled each time.
        self.log_after = HOLE_LOG_SECONDS
