"""The sequencer: follows the table, and says what is settled.

Promises: every committed label becomes part of exactly one chunk, in order of
seq, and none is skipped; a chunk is in the ring and at every subscriber within
one step of the event loop. When a promise of ours breaks, it stops, visibly.
Stands in the middle of the corridor, one per process: store -> sequencer -> outbox.
Does not belong here: who the subscribers are, sockets, history.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from sse_labels.backoff import Backoff
from sse_labels.database.connection import Connection
from sse_labels.errors import BrokenPromise, DatabaseRefused, DatabaseUnavailable
from sse_labels.feed.chunk import Chunk
from sse_labels.feed.ring import Ring
from sse_labels.feed.settled import HOLE_LOG_SECONDS, SettledRule
from sse_labels.feed.store import Store, TableState
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row

log = logging.getLogger(__name__)

#: While a hole is open the table is looked at again after this, or half the hole's age.
HOLE_POLL_SECONDS = 0.01
#: The commit-to-fan-out time is sampled at most this often; each sample is a query.
SAMPLE_SECONDS = 1.0


class Subscriber(Protocol):
    """Who receives chunks. `Neither method may await or raise; both may unsubscribe."""

    def push(self, chunk: Chunk) -> None:
        """Take the chunk that continues the one before."""

    def fall_back(self) -> None:
        """Read on from the table: what comes next does not continue what was pushed."""


class Sequencer:
    """Follows the table for this process; `run` is its one task.

    `head` and `ring` exist once `started` is set.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        page_max_events: int,
        ring_max_bytes: int,
        poll_seconds: float,
        gather_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._limit = page_max_events
        self._ring_max_bytes = ring_max_bytes
        self._poll_seconds = poll_seconds
        self._gather_seconds = gather_seconds
        self._clock = clock
        self._watchers: list[Callable[[Sequence[Row]], None]] = []
        self._wake = asyncio.Event()
        self._subscribers: dict[Filter | None, dict[Subscriber, None]] = {}
        self._rule: SettledRule | None = None
        self._sampled = -SAMPLE_SECONDS
        self._look_at_floor = False
        self.ring = Ring(0, ring_max_bytes)
        #: Nothing below it is served any more.
        self.floor = 1
        #: What a reader below the floor gets first.
        self.oldest = 1
        #: Which seqs belong together; None when the database does not say.
        self.epoch: str | None = None
        self.started = asyncio.Event()
        #: Whether the last look at the table succeeded.
        self.following = False
        metrics.gauges["head_seq"] = lambda: self.head
        metrics.gauges["floor_seq"] = lambda: self.floor
        metrics.gauges["following"] = lambda: self.following
        metrics.gauges["ring_bytes"] = lambda: self.ring.nbytes
        metrics.gauges["ring_chunks"] = lambda: len(self.ring)
        metrics.gauges["holes_open"] = lambda: (
            self._rule is not None and self._rule.hole is not None
        )
        metrics.gauges["hole_age_seconds"] = self.hole_age_seconds

    @property
    def head(self) -> int:
        """The newest settled seq: the end of the ring."""
        return self.ring.end

    def hole_age_seconds(self) -> float:
        """Return how long the open hole has been waited for; 0 when there is none."""
        hole = None if self._rule is None else self._rule.hole
        return 0.0 if hole is None else self._clock() - hole.since

    def watch(self, watcher: Callable[[Sequence[Row]], None]) -> None:
        """Hand all settled rows to `watcher`, withheld ones too.

        In the step in which their chunk is handed out, and before that.
        """
        self._watchers.append(watcher)

    def subscribe(self, subscriber: Subscriber, filter: Filter | None) -> None:
        """Push every chunk from now on, as `filter` shows it."""
        self._subscribers.setdefault(filter, {})[subscriber] = None

    def unsubscribe(self, subscriber: Subscriber, filter: Filter | None) -> None:
        """Push nothing more; harmless when not subscribed."""
        group = self._subscribers.get(filter)
        if group is not None:
            group.pop(subscriber, None)
            if not group:
                del self._subscribers[filter]

    def wake(self) -> None:
        """Look at the table soon: something may be new there."""
        self._wake.set()

    def floor_raised(self) -> None:
        """Look at the floor soon: it may be higher."""
        self._look_at_floor = True
        self.wake()

    async def run(self) -> None:
        """Follow the table until cancelled; wait for a lost database.

        Raises BrokenPromise, and DatabaseRefused when this role may no longer read: whoever
        follows without a right would keep its streams open and silent.
        """
        backoff = Backoff()
        lost = False
        while True:
            try:
                connection = await self._store.dedicated()
                try:
                    if lost:
                        self._metrics.count["database_reconnects"] += 1
                    await self._start(connection)
                    backoff.reset()
                    await self._follow(connection)
                finally:
                    connection.close()
            except DatabaseUnavailable as error:
                lost = True
                self.following = False
                wait = backoff.next()
                log.warning(
                    "the database is away", extra={"error": error, "next_try_seconds": wait}
                )
                await asyncio.sleep(wait)
            except DatabaseRefused as error:
                self.following = False
                log.critical("the sequencer stops, it may not read", extra={"error": error})
                raise
            except BrokenPromise as error:
                self.following = False
                self._metrics.count["broken_promises"] += 1
                log.critical("the sequencer stops, a promise is broken", extra={"error": error})
                raise

    async def look_at_state(self) -> TableState:
        """Read what readers must know beside the labels; serve nothing below its floor any more.

        Raises DatabaseUnavailable, and BrokenPromise when the database is in another epoch than
        what is streamed.
        """
        head = self.head
        state = await self._store.state()
        if self.started.is_set() and state.epoch != self.epoch:
            raise BrokenPromise(
                f"the database has begun epoch {state.epoch}, and {self.head} has been streamed in "
                f"epoch {self.epoch}: restart, to stream the new one"
            )
        self._forget_below(state, head)
        return state

    def _forget_below(self, state: TableState, head: int) -> None:
        """Go on from the floor of a state that was read when `head` was settled."""
        if state.floor >= self.floor:
            self.floor, self.oldest = state.floor, state.oldest(head)
            self.ring.forget_below(self.floor)

    async def _start(self, connection: Connection) -> None:
        """Find the head, or after a reconnect make sure that the rule still holds."""
        await self._store.schema.check()
        head = self.head
        state = await self._store.state()
        newest = await self._store.newest(connection)
        holders = await self._store.sequence_holders(connection)
        if self._rule is not None:
            if newest < self.head or state.epoch != self.epoch:
                raise BrokenPromise(
                    f"the database went back or was rebuilt: its newest seq is {newest} in epoch "
                    f"{state.epoch}, {self.head} has been streamed in epoch {self.epoch}"
                )
            self._forget_below(state, head)
            self._rule.renew(holders)
            self.following = True
            return
        self.epoch = state.epoch
        # All that is at or below `newest` is settled once today's holders have ended.
        since, due = self._clock(), HOLE_LOG_SECONDS
        waiting = holders
        while waiting:
            if self._clock() - since >= due:
                log.warning(
                    "waiting for transactions that took an id before the start",
                    extra={
                        "waiting_seconds": self._clock() - since,
                        "transactions": ",".join(sorted(waiting)),
                    },
                )
                due *= 2
            self._wake.clear()
            await self._pause(self._clock() - since)
            waiting &= await self._store.sequence_holders(connection)
        # Once more: only now is all that it says settled.
        state = await self._store.state()
        self._rule = SettledRule(newest, self._clock)
        self.ring = Ring(newest, self._ring_max_bytes)
        self._forget_below(state, newest)
        self.following = True
        self.started.set()
        log.info("following", extra={"head": newest})

    async def _follow(self, connection: Connection) -> None:
        while True:
            # Cleared before the table is read: a wake that comes meanwhile is not lost.
            self._wake.clear()
            if self._look_at_floor:
                self._look_at_floor = False
                await self.look_at_state()
            begun = self._clock()
            chunk, more = await self._look(connection)
            self.following = True
            assert self._rule is not None  # noqa: S101 - `_start` made it
            if chunk is not None:
                self.publish(chunk)
                await self._sample(connection, chunk)
            if more:
                # Full pages are not held back.
                continue
            if chunk is not None or self._rule.hole is not None:
                # At most one small chunk per gather_seconds, whatever it gathers under load;
                # after a pause the first label goes at once. While a hole is open,
                # notifications of what waits behind it come no faster either.
                await asyncio.sleep(max(0.0, begun + self._gather_seconds - self._clock()))
            await self._pause(None if self._rule.hole is None else self.hole_age_seconds())

    async def _look(self, connection: Connection) -> tuple[Chunk | None, bool]:
        """Read the table once; return what is settled, and whether there may be more at once."""
        rule = self._rule
        assert rule is not None  # noqa: S101 - `_start` made it
        if rule.hole is not None:
            rule.drop_ended(await self._store.sequence_holders(connection))
            self._log_hole(rule)
        rows = await self._store.rows_after(connection, rule.head, self._limit)
        taken, head = self._admit(rule, rows)
        if taken < len(rows) and rule.hole is None:
            # A hole. Its holders are read after the page, and when there are none, the page is
            # read again: who held the lock may have committed between the two.
            holders = await self._store.sequence_holders(connection)
            rule.open_hole(rows[-1].seq, holders)
            if holders:
                self._metrics.count["holes"] += 1
            else:
                rows = await self._store.rows_after(connection, rule.head, self._limit)
                taken, head = self._admit(rule, rows)
        more = rule.hole is None and (taken < len(rows) or len(rows) == self._limit)
        if head == rule.head:
            return None, more
        if (not taken or rows[0].seq != rule.head + 1) and await self._was_overtaken(rule):
            return None, True
        chunk = self._store.chunk(rows[:taken], start=rule.head, end=head, with_keys=True)
        self._metrics.count["unsigned_withheld"] += taken - len(chunk)
        rule.publish(head)
        for watch in self._watchers:
            watch(rows[:taken])
        return chunk, more

    async def _was_overtaken(self, rule: SettledRule) -> bool:
        """Go on from the floor when the gap after the head is one that retention made.

        It stays below the head of the server that deletes, and that may be ahead of this one.
        Read after the rows, as `Store.page` does: rows that it took show as a gap before them.
        """
        state = await self._store.state()
        floor = state.floor
        if floor <= rule.head + 1:
            return False
        log.warning(
            "labels were deleted before they were streamed here",
            extra={"head": rule.head, "floor": floor},
        )
        # Whoever deletes has seen its own head settle, and that is true for all.
        rule.publish(floor - 1)
        self.ring = Ring(floor - 1, self._ring_max_bytes)
        self._forget_below(state, floor - 1)
        for group in tuple(self._subscribers.values()):
            for subscriber in tuple(group):
                subscriber.fall_back()
        return True

    def _admit(self, rule: SettledRule, rows: list[Row]) -> tuple[int, int]:
        return rule.admit([row.seq for row in rows], complete=len(rows) < self._limit)

    def publish(self, chunk: Chunk) -> None:
        """Put the chunk into the ring and hand it to every subscriber, without an await."""
        self.ring.append(chunk)
        self._metrics.count["events_followed"] += len(chunk)
        self._metrics.count["chunks_followed"] += 1
        for filter, group in tuple(self._subscribers.items()):
            part = chunk.select(filter)
            # A copy: a subscriber that is too slow leaves while it is being pushed to.
            for subscriber in tuple(group):
                subscriber.push(part)

    async def _pause(self, waited: float | None = None) -> None:
        """Wait for a wake, or until it is time to look anyway.

        `waited` is how long transactions have been waited for: one that rolls back wakes
        nobody, so the table is looked at often at first, and then ever more rarely.
        """
        longest = self._poll_seconds
        if waited is not None:
            longest = min(longest, max(HOLE_POLL_SECONDS, waited / 2))
        try:
            async with asyncio.timeout(longest):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _sample(self, connection: Connection, chunk: Chunk) -> None:
        handed_over = self._clock()
        if not chunk.seqs or handed_over - self._sampled < SAMPLE_SECONDS:
            return
        self._sampled = handed_over
        age = await self._store.commit_age(connection, chunk.seqs[-1])
        if age is not None:
            # The age was taken after the hand-over: less what has passed since then.
            self._metrics.fanout_seconds.observe(max(0.0, age - (self._clock() - handed_over)))

    def _log_hole(self, rule: SettledRule) -> None:
        hole = rule.hole
        if hole is not None and self._clock() - hole.since >= hole.log_after:
            hole.log_after *= 2
            log.warning(
                "labels wait for open transactions that took an id",
                extra={
                    "head": rule.head,
                    "seen": hole.hi,
                    "waiting_seconds": self._clock() - hole.since,
                    "transactions": ",".join(sorted(hole.waiting)),
                },
            )
