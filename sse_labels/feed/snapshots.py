"""Snapshots: choose the state with which a stream with `snapshot=active` begins.

Promises: consumers that connect at about the same time share one state. Otherwise the whole table
would be read for each consumer while labels are published. Newer events follow the state.
"""

from __future__ import annotations

from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.store import Snapshot

#: New consumers share a state for this many seconds, and until this many newer events exist.
#: The pages of the state are read once for all of them.
SHARED_SECONDS = 30.0
SHARED_EVENTS = 10_000


class Snapshots:
    """Returns the state with which a consumer begins."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._sequencer = sequencer
        #: The shared state, the time when it was new (seconds since 1970), the floor at that time.
        self._shared: tuple[Snapshot, float, int] | None = None

    def begin(
        self, cursor: int, expired_since: float | None, now: float
    ) -> tuple[Snapshot, float | None]:
        """Return the state for a consumer at `cursor`, and since when expired labels are reported.

        Times are in seconds since 1970.
        """
        head = self._sequencer.head
        if cursor > 0:
            return Snapshot(head, resumed=True), expired_since
        if self._shared is None or not self._is_new_enough(*self._shared, now):
            self._shared = Snapshot(head, resumed=False), now, self._sequencer.floor
        snapshot, begun, _ = self._shared
        return snapshot, None if expired_since is None else min(expired_since, begun)

    def _is_new_enough(self, snapshot: Snapshot, begun: float, floor: int, now: float) -> bool:
        # Both differences may be negative: the database was replaced, or the clock was set back.
        return (
            floor == self._sequencer.floor
            and 0 <= self._sequencer.head - snapshot.until <= SHARED_EVENTS
            and 0 <= now - begun <= SHARED_SECONDS
        )
