"""What is held, or used up, by all processes together.

Promises: never more than allowed, whatever the processes do at the same time: each says
what it takes before it looks at what the others have. So of two that take the last place
in the same microsecond both may be refused, and never are both let in.
Does not belong here: how much is allowed.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Iterator, Sequence

#: Counts that addresses are spread over, as many as two bytes can name, …
CELLS = 1 << 16
#: … and how many each has: the smallest is right unless all are shared. Beside 8,000 connections
#: from as many addresses, 2 in 100 are taken for holding one that they do not, 6 in 100,000 for
#: two, and with 16 other addresses at their limit one in 10¹² for that. (Of 16,384 and two each it
#: was 39, and 7, in 100.)
CELLS_EACH = 4
#: Publishers whose rate is remembered at the same time.
RATE_ROWS = 8_192
#: Rows that one publisher may stand in.
RATE_PROBES = 64
#: It is held for some 10 µs; who is not let in for 50 ms goes on without.
LOCK_TRIES = 250
LOCK_REST_SECONDS = 0.0002
_ROW_BYTES = 16
RATES_BYTES = RATE_ROWS * _ROW_BYTES


class Tally:
    """How many of one thing this process holds, and all."""

    def __init__(self, mine: memoryview | list[int], others: Sequence[memoryview]) -> None:
        """Each is one number; only `mine` is written."""
        self._mine = mine
        self._others = others

    @classmethod
    def alone(cls) -> Tally:
        """Return one of a process that has no others."""
        return cls([0], ())

    @property
    def here(self) -> int:
        """How many this process holds."""
        return int(self._mine[0])

    def everywhere(self) -> int:
        """Return how many all hold."""
        return self.here + sum(other[0] for other in self._others)

    def take(self, most: int) -> bool:
        """Hold one more; False when `most` are held."""
        self._mine[0] += 1
        if self.everywhere() <= most:
            return True
        self._mine[0] -= 1
        return False

    def give_back(self) -> None:
        """Hold one less."""
        self._mine[0] -= 1


class AddressTally:
    """How many of one thing each address holds, counted in cells that addresses may share.

    A process knows exactly what its own addresses hold; this tells it about the others'.
    """

    def __init__(self, mine: memoryview, others: Sequence[memoryview], secret: bytes) -> None:
        self._mine = mine
        self._others = others
        self._secret = secret

    def add(self, key: str, number: int) -> None:
        """Hold so many more."""
        for cell in self._cells(key):
            self._mine[cell] += number

    def elsewhere(self, key: str) -> int:
        """Return how many the other processes hold; now and then too many, never too few."""
        return min(sum(other[cell] for other in self._others) for cell in self._cells(key))

    def _cells(self, key: str) -> set[int]:
        # Keyed: nobody can choose an address that meets another's cells.
        digest = hashlib.blake2b(
            key.encode(), digest_size=2 * CELLS_EACH, key=self._secret
        ).digest()
        return set(memoryview(digest).cast("H"))


class Rates:
    """One number per name, read and written under a lock: what GCRA keeps of a publisher.

    The number is a time of the monotonic clock, which all processes of a machine share;
    one that has passed says nothing any more, and its row is free.
    """

    def __init__(self, rows: memoryview, descriptor: int, secret: bytes) -> None:
        self._names = rows.cast("q")
        self._times = rows.cast("d")
        self._descriptor = descriptor
        self._secret = secret

    def __enter__(self) -> None:
        # A record lock: it belongs to the process, so those that inherited the descriptor exclude
        # each other, and one that is killed leaves nothing locked.
        for _ in range(LOCK_TRIES):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except (BlockingIOError, PermissionError):  # which of both is the system's choice
                time.sleep(LOCK_REST_SECONDS)
            else:
                return
        # Stopped, or starved, with the lock in hand: one label too many does less harm than all
        # processes that stand still for its sake.

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1)

    def get(self, name: str) -> float | None:
        """Return the number kept under `name`."""
        known = self._id(name)
        return next((self._times[2 * row + 1] for row in self._rows(known, known)), None)

    def set(self, name: str, value: float, now: float) -> None:
        """Keep a number; the one that is over first makes room when none is over."""
        known = self._id(name)
        row = next(self._rows(known, known), None)
        if row is None:
            row = min(self._rows(known), key=lambda row: max(now, self._times[2 * row + 1]))
        self._times[2 * row + 1] = value
        self._names[2 * row] = known

    def _rows(self, known: int, wanted: int | None = None) -> Iterator[int]:
        for probe in range(RATE_PROBES):
            row = (known + probe) % RATE_ROWS
            if wanted is None or self._names[2 * row] == wanted:
                yield row

    def _id(self, name: str) -> int:
        digest = hashlib.blake2b(name.encode(), digest_size=8, key=self._secret).digest()
        # 0 is an empty row's.
        return int.from_bytes(digest, "big", signed=True) or 1
