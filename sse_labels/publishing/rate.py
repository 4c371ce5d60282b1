"""The publish rate: limits how fast one publisher may publish.

Promises: a publisher publishes at most `burst_labels` at once, and `labels_per_second` in the long
run. A refusal says when the same request would be accepted.

The rule is GCRA (ITU-T I.371): a token bucket that keeps one number for each publisher.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sse_labels.errors import PayloadTooLarge, RateLimited

#: The most publishers that are remembered. A forgotten publisher has its full burst again.
MAX_PUBLISHERS = 10_000
_SECOND = 10**9


class PublishRate:
    """A rate of labels for each publisher."""

    def __init__(
        self,
        labels_per_second: int | None,
        burst_labels: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`labels_per_second` None means no limit. `clock` returns whole nanoseconds."""
        self._rate = labels_per_second
        self._burst = burst_labels
        self._clock = clock
        #: The time at which each publisher has its full burst again. The latest publisher is last.
        self._full_at: dict[str, int] = {}

    def take(self, publisher: str, labels: int) -> None:
        """Count `labels` for `publisher`, all or none. Raises RateLimited or PayloadTooLarge."""
        if self._rate is None:
            return
        if labels > self._burst:
            # Waiting would not help: the burst never allows so many labels.
            raise PayloadTooLarge(f"labels: got {labels}, expected at most {self._burst} at once")
        now = self._clock()
        full_at = max(now, self._full_at.get(publisher, now)) + labels * _SECOND // self._rate
        wait = full_at - now - self._burst * _SECOND // self._rate
        if wait > 0:
            raise RateLimited(
                f"{publisher!r} may not publish {labels} more labels yet", wait / _SECOND
            )
        self._full_at.pop(publisher, None)
        self._full_at[publisher] = full_at
        if len(self._full_at) > MAX_PUBLISHERS:
            del self._full_at[next(iter(self._full_at))]
