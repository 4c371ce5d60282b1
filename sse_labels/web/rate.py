"""How fast one publisher may publish.

Promises: nobody publishes more than a burst at once nor more than so many labels
per second in the long run; whoever is refused is told when it would be accepted.
Stands in front of the publisher; a refused request reaches nothing behind it.
Does not belong here: who the publisher is, what is published.

The rule is GCRA (ITU-T I.371, a token bucket that keeps one number per publisher),
by throttled-py: it counts by the monotonic clock and knows when to come back.
Of several processes all count in one table, under a lock: publishing costs a transaction,
beside which two system calls are nothing.
`limits` (5.8.0) does neither: it has windows of whole seconds by the wall clock, no
answer to "when" for more than one at once, and starts a thread per hit.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

from throttled import MemoryStore, Throttled, rate_limiter, utils
from throttled.store.memory import MemoryStoreBackend

from sse_labels.errors import PayloadTooLarge, RateLimited
from sse_labels.shared.counts import Rates

#: Publishers remembered at once; one that is forgotten has its whole burst again.
MAX_PUBLISHERS = 10_000


class PublishRate:
    """A rate of labels for each publisher."""

    def __init__(
        self, labels_per_second: int | None, burst_labels: int, shared: Rates | None = None
    ) -> None:
        """None as `labels_per_second` is no limit; `shared` are the rates of all processes."""
        self._burst = burst_labels
        self._throttle: Throttled | None = None
        if labels_per_second is not None:
            self._throttle = Throttled(
                using="gcra",
                quota=rate_limiter.per_duration(
                    timedelta(seconds=1), labels_per_second, burst=burst_labels
                ),
                store=MemoryStore(options={"MAX_SIZE": MAX_PUBLISHERS})
                if shared is None
                else SharedStore(shared),
            )

    def take(self, publisher: str, labels: int) -> None:
        """Count `labels` for `publisher`, all or none; raise RateLimited or PayloadTooLarge."""
        if self._throttle is None:
            return
        if labels > self._burst:
            # Waiting would not help: no bucket ever holds so many.
            raise PayloadTooLarge(f"labels: got {labels}, expected at most {self._burst} at once")
        result = self._throttle.limit(publisher, cost=labels)
        if result.limited:
            raise RateLimited(
                f"{publisher!r} may not publish {labels} more labels yet",
                result.state.retry_after,
            )


class SharedStore(MemoryStore):
    """throttled-py's store, in memory that several processes have."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self._backend = SharedBackend(rates)


class SharedBackend(MemoryStoreBackend):
    """What GCRA asks of a store; it does so under `lock`."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.lock = cast("Any", rates)
        self._rates = rates

    def get(self, key: str) -> float | None:
        """Return the number kept for a publisher."""
        return self._rates.get(key)

    def set(self, key: str, value: float, timeout: int) -> None:
        """Keep it; when it is over, it says so itself."""
        self._rates.set(key, value, utils.now_mono_f())
