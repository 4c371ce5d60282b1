"""What one upstream may cause: so many of a kind in each minute, and its turn of the event loop.

Promises: whatever an upstream sends, the others get their turn after `TURN_SECONDS` of work.
Does not belong here: what is bounded, and what happens beyond it (`following`, `upstream`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

QUOTA_SECONDS = 60.0
#: Work for one upstream before the others get their turn.
TURN_SECONDS = 0.005
#: One step that took longer, such as decoding a large message, is followed by as long a pause.
LONG_TURN_SECONDS = 0.05


class Quota:
    """So many in each minute, counted from the first one."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._since = clock()
        self._taken = 0

    def take(self, wanted: int = 1) -> int:
        """Return how many of `wanted` are still within the quota, and count them."""
        now = self._clock()
        if now - self._since >= QUOTA_SECONDS:
            self._since, self._taken = now, 0
        granted = min(wanted, self._most - self._taken)
        self._taken += granted
        return granted


class Turn:
    """The work of one upstream since the others had their turn."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._worked = 0.0
        self._began = 0.0

    def begin(self) -> None:
        """Count what follows as work."""
        self._began = self._clock()

    async def end(self) -> None:
        """Let the others run, if it is their turn; what follows is counted as work again."""
        self._worked += self._clock() - self._began
        if self._worked >= TURN_SECONDS:
            # Without the pause a large message in each pass of the loop leaves the others a tenth.
            await asyncio.sleep(self._worked if self._worked >= LONG_TURN_SECONDS else 0)
            self._worked = 0.0
        self._began = self._clock()
