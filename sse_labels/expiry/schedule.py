"""The schedule: the labels that expire next, up to `end`, in bounded memory.

Promises: every label that was added and is due up to `end` is returned once, the earliest first.
The schedule holds at most `most` labels: when it is full, `end` moves to an earlier time.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import NamedTuple


class Due(NamedTuple):
    """The time when a label expires, in seconds since 1970, and its seq. The order of notices."""

    at: float
    seq: int


class Schedule:
    """A heap of labels that are due up to `end`."""

    def __init__(self, end: Due, most: int) -> None:
        """Begin empty: labels due up to `end` have been returned already, or are not asked for."""
        self._heap: list[Due] = []
        self._most = most
        #: Labels due later are not here. The caller loads them and calls `extend`.
        self.end = end

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def room(self) -> int:
        """The number of labels that may still be added."""
        return self._most - len(self._heap)

    @property
    def next_at(self) -> float | None:
        """The time when the earliest label is due, None when the schedule is empty."""
        return self._heap[0].at if self._heap else None

    def add(self, due: Due) -> bool:
        """Add a label unless it is due after `end`. Return whether it was added.

        A label may be added twice; it is returned once.
        """
        if due > self.end:
            return False
        heappush(self._heap, due)
        if len(self._heap) > self._most:
            # A quarter is dropped at once, so that a flood of labels does not sort for each label.
            self._heap.sort()
            del self._heap[3 * self._most // 4 :]
            self.end = self._heap[-1]
        return True

    def extend(self, dues: Iterable[Due], end: Due) -> None:
        """Move `end` to a later time, and add the labels up to it."""
        self.end = end
        for due in dues:
            self.add(due)

    def shorten(self, end: Due) -> None:
        """Move `end` to an earlier time, and drop the labels after it."""
        if end < self.end:
            self._heap = sorted(due for due in self._heap if due <= end)
            self.end = end

    def pop(self, now: float, most: int) -> list[Due]:
        """Return labels that are due at `now`, at most `most`."""
        dues: list[Due] = []
        while self._heap and self._heap[0].at <= now and len(dues) < most:
            due = heappop(self._heap)
            # A label may be added from the table and by the sequencer. The heap returns both
            # one after the other.
            if not dues or due != dues[-1]:
                dues.append(due)
        return dues
