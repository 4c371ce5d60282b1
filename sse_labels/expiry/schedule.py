"""The schedule: what expires next, up to a horizon, in bounded memory.

Promises: everything that was added and lies up to `end` is handed out once, the earliest first;
there are never more than `most`, because `end` draws nearer when there would be.
Stands beside the corridor, under the expiry, which loads it and is its only user.
Does not belong here: clocks, the database, whether a label is still in force.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import NamedTuple


class Due(NamedTuple):
    """When a label expires, in seconds since 1970, and its seq: the order in which it is told."""

    at: float
    seq: int


class Schedule:
    """A heap of what is due after the beginning, and not after `end`."""

    def __init__(self, end: Due, most: int) -> None:
        """Hold nothing yet: all up to `end` has been handed out already, or is not asked for."""
        self._heap: list[Due] = []
        self._most = most
        #: What lies beyond is not here; whoever wants it loads it and calls `extend`.
        self.end = end

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def room(self) -> int:
        """How many more it holds."""
        return self._most - len(self._heap)

    @property
    def next_at(self) -> float | None:
        """When the earliest is due; None when there is none."""
        return self._heap[0].at if self._heap else None

    def add(self, due: Due) -> bool:
        """Take one more, unless it lies beyond the end; say whether it was taken.

        One that is here already may be added again.
        """
        if due > self.end:
            return False
        heappush(self._heap, due)
        if len(self._heap) > self._most:
            # A quarter at once, so that a flood does not sort the heap for each label.
            self._heap.sort()
            del self._heap[3 * self._most // 4 :]
            self.end = self._heap[-1]
        return True

    def extend(self, dues: Iterable[Due], end: Due) -> None:
        """Take all that lies between the end and a new one."""
        self.end = end
        for due in dues:
            self.add(due)

    def shorten(self, end: Due) -> None:
        """Let go of what lies beyond an end, if that is nearer."""
        if end < self.end:
            self._heap = sorted(due for due in self._heap if due <= end)
            self.end = end

    def pop(self, now: float, most: int) -> list[Due]:
        """Hand out what is due by now, at most so many."""
        dues: list[Due] = []
        while self._heap and self._heap[0].at <= now and len(dues) < most:
            due = heappop(self._heap)
            # Loaded and fed: equal ones come one after the other.
            if not dues or due != dues[-1]:
                dues.append(due)
        return dues
