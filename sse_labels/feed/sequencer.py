"""The sequencer: follows the table, and pushes settled labels to its subscribers. One per process.

Promises: every committed label becomes part of exactly one chunk, in order of seq, and no label is
skipped. A chunk reaches the ring and every subscriber within one step of the event loop. When the
database breaks this order, the sequencer logs the error and stops.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from sse_labels.backoff import Backoff
from sse_labels.database.connection import Connection
from sse_labels.errors import BrokenPromise, DatabaseRefused, DatabaseUnavailable
from sse_labels.feed.chunk import Chunk
from sse_labels.feed.ring import Ring
from sse_labels.feed.settled import HOLE_LOG_SECONDS, SettledRule
from sse_labels.feed.store import Store, TableState
from sse_labels.feed.subscribers import Subscribers
from sse_labels.metrics import Metrics
from sse_labels.protocol.label import Row

log = logging.getLogger(__name__)

#: While a hole is open, the table is read again after this time, or after half the hole's age.
HOLE_POLL_SECONDS = 0.01
#: The commit-to-fan-out time is sampled at most this often: each sample is a query.
SAMPLE_SECONDS = 1.0


class Sequencer:
    """Follows the table for this process. `run` is its only task.

    `head` and `ring` are valid once `started` is set.
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
        self.subscribers = Subscribers()
        self._rule: SettledRule | None = None
        self._sampled = -SAMPLE_SECONDS
        self._floor_may_be_higher = False
        self.ring = Ring(0, ring_max_bytes)
        #: No event below the floor is served any more.
        self.floor = 1
        #: The first seq that a reader below the floor gets.
        self.oldest = 1
        #: The epoch to which the seqs belong; None when the database has no epochs.
        self.epoch: str | None = None
        self.started = asyncio.Event()
        #: Whether the last read of the table succeeded.
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
        """Return how long the open hole has existed; 0 when there is no hole."""
        hole = None if self._rule is None else self._rule.hole
        return 0.0 if hole is None else self._clock() - hole.since

    def watch(self, watcher: Callable[[Sequence[Row]], None]) -> None:
        """Call `watcher` with all settled rows, also with withheld ones.

        The call comes before their chunk is published, in the same step of the event loop.
        """
        self._watchers.append(watcher)

    def wake(self) -> None:
        """Read the table soon: it may contain new labels."""
        self._wake.set()

    def floor_raised(self) -> None:
        """Read the floor soon: it may be higher."""
        self._floor_may_be_higher = True
        self.wake()

    async def run(self) -> None:
        """Follow the table until cancelled. While the database is away, wait.

        Raises BrokenPromise. Raises DatabaseRefused when this role may no longer read the table:
        otherwise all streams would stay open and silent.
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

    async def read_state(self) -> TableState:
        """Read floor and epoch. From then on, no event below the floor is served.

        Raises DatabaseUnavailable. Raises BrokenPromise when the database has begun an epoch that
        is not the streamed one.
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
        """Raise the floor to that of `state`, which was read when `head` was settled."""
        if state.floor >= self.floor:
            self.floor, self.oldest = state.floor, state.oldest(head)
            self.ring.forget_below(self.floor)

    async def _start(self, connection: Connection) -> None:
        """Find the head. After a reconnect, check that the database continues what was streamed."""
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
        # Every seq up to `newest` is settled once these transactions have ended.
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
        # Read again: the first label of the earlier state was perhaps not settled.
        state = await self._store.state()
        self._rule = SettledRule(newest, self._clock)
        self.ring = Ring(newest, self._ring_max_bytes)
        self._forget_below(state, newest)
        self.following = True
        self.started.set()
        log.info("following", extra={"head": newest})

    async def _follow(self, connection: Connection) -> None:
        while True:
            # Cleared before the table is read: a wake during the read is not lost.
            self._wake.clear()
            if self._floor_may_be_higher:
                self._floor_may_be_higher = False
                await self.read_state()
            begun = self._clock()
            chunk, more = await self._read_table(connection)
            self.following = True
            assert self._rule is not None  # noqa: S101 - `_start` made it
            if chunk is not None:
                self.publish(chunk)
                await self._sample(connection, chunk)
            if more:
                # After a full page the table is read again at once.
                continue
            if chunk is not None or self._rule.hole is not None:
                # At most one small chunk per gather_seconds: under load a chunk gathers more
                # labels. After a pause the first label is pushed at once. While a hole is open,
                # notifications about labels behind it cause no more reads than this either.
                await asyncio.sleep(max(0.0, begun + self._gather_seconds - self._clock()))
            await self._pause(None if self._rule.hole is None else self.hole_age_seconds())

    async def _read_table(self, connection: Connection) -> tuple[Chunk | None, bool]:
        """Read one page. Return the settled chunk, and whether more may be settled already."""
        rule = self._rule
        assert rule is not None  # noqa: S101 - `_start` made it
        if rule.hole is not None:
            rule.drop_ended(await self._store.sequence_holders(connection))
            self._log_hole(rule)
        rows = await self._store.rows_after(connection, rule.head, self._limit)
        taken, head = self._admit(rule, rows)
        if taken < len(rows) and rule.hole is None:
            # A hole. The holders are read after the page. If there are none, the page is read
            # again: a holder may have committed between the two reads.
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
        """Return whether retention made the gap after the head; if so, go on from the floor.

        Retention stays below the head of the server that deletes. That head may be ahead of this
        one. The state is read after the rows, as in `Store.page`: rows that retention deleted
        appear as a gap before the remaining rows.
        """
        state = await self._store.state()
        floor = state.floor
        if floor <= rule.head + 1:
            return False
        log.warning(
            "labels were deleted before they were streamed here",
            extra={"head": rule.head, "floor": floor},
        )
        # The server that deletes has seen every seq below the floor settle. So they are settled.
        rule.publish(floor - 1)
        self.ring = Ring(floor - 1, self._ring_max_bytes)
        self._forget_below(state, floor - 1)
        self.subscribers.fall_back()
        return True

    def _admit(self, rule: SettledRule, rows: list[Row]) -> tuple[int, int]:
        return rule.admit([row.seq for row in rows], complete=len(rows) < self._limit)

    def publish(self, chunk: Chunk) -> None:
        """Append the chunk to the ring and push it to every subscriber, without an await."""
        self.ring.append(chunk)
        self._metrics.count["events_followed"] += len(chunk)
        self._metrics.count["chunks_followed"] += 1
        self.subscribers.push(chunk)

    async def _pause(self, waited: float | None = None) -> None:
        """Wait for a wake, or until the next read is due.

        `waited` is how long open transactions have been waited for. A transaction that rolls back
        sends no notification. So the table is read often at first, and then less and less often.
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
        pushed = self._clock()
        if not chunk.seqs or pushed - self._sampled < SAMPLE_SECONDS:
            return
        self._sampled = pushed
        age = await self._store.commit_age(connection, chunk.seqs[-1])
        if age is not None:
            # The age was measured after the push: subtract the time since the push.
            self._metrics.fanout_seconds.observe(max(0.0, age - (self._clock() - pushed)))

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
