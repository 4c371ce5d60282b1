"""Limits on what one upstream may cause: a number per minute, and time of the event loop.

Promises: other tasks get a turn after `TURN_SECONDS` of work for one upstream.
Does not belong here: which things are limited, and what happens above a limit (`following`,
`upstream`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

QUOTA_SECONDS = 60.0
#: How long one upstream may work before other tasks get a turn.
TURN_SECONDS = 0.005
#: After a longer step, such as decoding a large message, the upstream pauses as long as the step.
LONG_TURN_SECONDS = 0.05


class Quota:
    """A limit for each period of `QUOTA_SECONDS`."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._since = clock()
        self._taken = 0

    def take(self, wanted: int = 1) -> int:
        """Return how many of `wanted` the quota still allows, and count them."""
        now = self._clock()
        if now - self._since >= QUOTA_SECONDS:
            self._since, self._taken = now, 0
        granted = min(wanted, self._most - self._taken)
        self._taken += granted
        return granted


class Turn:
    """The time that one upstream has worked since other tasks had a turn."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._worked = 0.0
        self._began = 0.0

    def begin(self) -> None:
        """Start to count time as work."""
        self._began = self._clock()

    async def end(self) -> None:
        """Let other tasks run if the work took long enough, and start to count again."""
        self._worked += self._clock() - self._began
        if self._worked >= TURN_SECONDS:
            # Without the pause, a large message in each pass of the event loop would leave other
            # tasks a tenth of the time.
            await asyncio.sleep(self._worked if self._worked >= LONG_TURN_SECONDS else 0)
            self._worked = 0.0
        self._began = self._clock()
