"""How fast one publisher may publish.

Promises: nobody publishes more than a burst at once nor more than so many labels
per second in the long run; whoever is refused is told when it would be accepted.
Stands in front of the publisher; a refused request reaches nothing behind it.
Does not belong here: who the publisher is, what is published.

The rule is GCRA (ITU-T I.371): a token bucket that keeps one number for each publisher.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sse_labels.errors import PayloadTooLarge, RateLimited

#: Publishers remembered at once; one that is forgotten has its whole burst again.
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
        """None as `labels_per_second` is no limit; `clock` tells whole nanoseconds."""
        self._rate = labels_per_second
        self._burst = burst_labels
        self._clock = clock
        #: When each publisher has its whole burst again; who published last stands last.
        self._whole_at: dict[str, int] = {}

    def take(self, publisher: str, labels: int) -> None:
        """Count `labels` for `publisher`, all or none; raise RateLimited or PayloadTooLarge."""
        if self._rate is None:
            return
        if labels > self._burst:
            # Waiting would not help: no bucket ever holds so many.
            raise PayloadTooLarge(f"labels: got {labels}, expected at most {self._burst} at once")
        now = self._clock()
        whole_at = max(now, self._whole_at.get(publisher, now)) + labels * _SECOND // self._rate
        wait = whole_at - now - self._burst * _SECOND // self._rate
        if wait > 0:
            raise RateLimited(
                f"{publisher!r} may not publish {labels} more labels yet", wait / _SECOND
            )
        self._whole_at.pop(publisher, None)
        self._whole_at[publisher] = whole_at
        if len(self._whole_at) > MAX_PUBLISHERS:
            del self._whole_at[next(iter(self._whole_at))]
