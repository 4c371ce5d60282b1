"""Which state a stream with `snapshot=active` begins with.

While labels are published every consumer would have a state of its own, for which the whole table
is read. Consumers that come together share one, and what came since follows it.
"""

from __future__ import annotations

from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.store import Snapshot

#: New consumers begin with the same state for so many seconds, while no more events than that
#: have come since: its pages are read once for all of them.
SHARED_SECONDS = 30.0
SHARED_EVENTS = 10_000


class Snapshots:
    """Hands out the state that consumers begin with."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._sequencer = sequencer
        #: The state that is shared, when it was new, since 1970, and the floor then.
        self._shared: tuple[Snapshot, float, int] | None = None

    def begin(
        self, cursor: int, expired_since: float | None, now: float
    ) -> tuple[Snapshot, float | None]:
        """Return the state for a consumer at `cursor`, and from when on it is told of expiries."""
        head = self._sequencer.head
        if cursor > 0:
            return Snapshot(head, resumed=True), expired_since
        if self._shared is None or not self._is_new_enough(*self._shared, now):
            self._shared = Snapshot(head, resumed=False), now, self._sequencer.floor
        snapshot, begun, _ = self._shared
        return snapshot, None if expired_since is None else min(expired_since, begun)

    def _is_new_enough(self, snapshot: Snapshot, begun: float, floor: int, now: float) -> bool:
        # Either may be less than nothing: another database, a clock that was set.
        return (
            floor == self._sequencer.floor
            and 0 <= self._sequencer.head - snapshot.until <= SHARED_EVENTS
            and 0 <= now - begun <= SHARED_SECONDS
        )
