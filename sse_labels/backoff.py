"""The time to wait before the next try: growing, random, bounded.

Promises: when many callers fail together, their waits differ. No wait is longer than the bound.
"""

from __future__ import annotations

import random


class Backoff:
    """Waits in seconds: a random part of a ceiling that doubles up to `longest`."""

    def __init__(self, first: float = 0.1, longest: float = 5.0) -> None:
        self._first = first
        self._longest = longest
        self._ceiling = first

    def reset(self) -> None:
        """Start again from the shortest wait. Called after a success."""
        self._ceiling = self._first

    def next(self) -> float:
        """Return the next wait: between half the ceiling and all of it."""
        ceiling = self._ceiling
        self._ceiling = min(self._longest, 2 * ceiling)
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, keeps no secret
