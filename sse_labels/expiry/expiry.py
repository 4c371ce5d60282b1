"""The expiry: tells those who ask when a label in force expires.

Promises: each label that was in force when it expired is told once to each stream that asks for it
at that time, in order of their times; late, while the database is away or slow, and never not at
all. While nobody asks it does nothing.
Stands beside the corridor, one per process: the sequencer feeds it with what is new, the table
with what was there before, and each stream that asks has an ExpiryReader on it.
Does not belong here: what a stream does with a notice, and when it is its turn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from sse_labels.backoff import Backoff
from sse_labels.errors import DatabaseUnavailable
from sse_labels.expiry.schedule import Due, Schedule
from sse_labels.feed.reads import Reads
from sse_labels.feed.store import Store
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.formats import expires_at
from sse_labels.protocol.label import Row
from sse_labels.protocol.notice import Notice
from sse_labels.protocol.seq import SEQ_MAX

log = logging.getLogger(__name__)

#: What expires within this time is in the schedule …
HORIZON_SECONDS = 3600.0
#: … and so long before its end the next part is loaded: on Ozone's table that is a scan.
REFILL_SECONDS = 300.0
#: Labels in the schedule, about 120 bytes each; when more expire, the horizon is nearer.
SCHEDULE_MAX_LABELS = 100_000
#: Rows read at once for the schedule: 5 ms of the event loop.
LOAD_ROWS = 5000
#: Labels checked and told at once.
CHECKED_AT_ONCE = 500
#: Labels in a page of what had expired before …
PAGE_LABELS = 2000
#: … of so many that are looked for at once, since that reads three days of the table at least.
RUN_LABELS = 20_000
#: A clock that is set shows within this time.
LOOK_SECONDS = 5.0
#: The clock is not looked at more often than this.
EARLY_SECONDS = 0.001
#: How far the date in `exp` may be from the one in UTC: an offset is less than a day.
DAY_SECONDS = 86_400.0
#: 0001-01-01T00:00:00Z, the first time that Python's datetime can tell.
FIRST_TIME = -62_135_596_800.0

LabelKey = tuple[str, str, str, str]


class NoticeConsumer(Protocol):
    """Who is told. May neither await nor raise; may leave."""

    def tell(self, notices: Sequence[Notice], late: int) -> None:
        """Take what has just expired, in order; the first `late` of them are out of order.

        Those came when others that expired after them had been told already.
        """

    def set_back(self, now: float) -> None:
        """Take what expires after `now`, too: the clock was ahead."""


class NoticePage(NamedTuple):
    """What had expired up to `end`, as far as it is in force."""

    notices: list[Notice]
    end: Due


class Run(NamedTuple):
    """All that expires after `begin` and up to `end`, in force or not."""

    begin: Due
    dues: list[Due]
    end: Due


#: Before all times.
NEVER = Due(-inf, 0)
#: Nothing has been looked for.
NOTHING = Run(NEVER, [], NEVER)


class Expiry:
    """Keeps the schedule while somebody asks; `run` is its one task."""

    def __init__(
        self,
        store: Store,
        head: Callable[[], int],
        metrics: Metrics,
        *,
        floor: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.time,
        max_labels: int = SCHEDULE_MAX_LABELS,
    ) -> None:
        """`clock` is what times are compared with; it may be set. Nothing below `floor` is told."""
        self._store = store
        self._head = head
        self._floor = floor
        self._max_labels = max_labels
        self._readers: dict[Filter | None, dict[NoticeConsumer, None]] = {}
        self._asked = asyncio.Event()
        self._wake = asyncio.Event()
        self._schedule = Schedule(NEVER, max_labels)
        #: Notices that somebody has not read yet, by what a newer label makes of them.
        self._alive: WeakValueDictionary[LabelKey, Notice] = WeakValueDictionary()
        #: How many checks are under way, and what was streamed meanwhile.
        self._checks = 0
        self._newer: dict[LabelKey, int] = {}
        #: Where pages are cut from. What was stored since is told to readers as late.
        self._run = NOTHING
        self._reads = Reads(1)
        self.clock = clock
        #: What the clock said last.
        self._looked_at = 0.0
        #: All that was due up to here has been told, but for what was not here yet.
        self.told = NEVER
        metrics.gauges["expiries_scheduled"] = lambda: len(self._schedule)

    def ask(self, reader: NoticeConsumer, filter: Filter | None, now: float) -> None:
        """Tell `reader` of all that expires from now on and that `filter` lets through."""
        if not self._readers:
            self.told = Due(now, SEQ_MAX)
            self._schedule = Schedule(self.told, self._max_labels)
            self._looked_at = now
            self._asked.set()
        self._readers.setdefault(filter, {})[reader] = None

    def leave(self, reader: NoticeConsumer, filter: Filter | None) -> None:
        """Tell it nothing more; harmless when it has not asked."""
        group = self._readers.get(filter, {})
        if reader not in group:
            return
        del group[reader]
        if not group:
            del self._readers[filter]
        if not self._readers:
            self._asked.clear()
            # Another one, so that what is under way fills the one that nobody looks at.
            self._schedule = Schedule(NEVER, self._max_labels)
            self._run = NOTHING
            self.wake()

    def wake(self) -> None:
        """Look at the clock now."""
        self._wake.set()

    def take(self, rows: Sequence[Row]) -> None:
        """Schedule what the sequencer is about to stream; let go of what it takes the place of."""
        if not (self._readers or self._checks):
            return
        for row in rows:
            key = row.key
            if self._checks:
                self._newer[key] = row.seq
            before = self._alive.get(key)
            if before is not None:
                before.superseded = True
            at = None if row.neg else expires_at(row.exp)
            if at is not None and self._schedule.add(Due(at, row.seq)):
                self.wake()

    async def run(self) -> None:
        """Tell until cancelled; what the database does not answer is asked again."""
        backoff = Backoff()
        while True:
            await self._asked.wait()
            try:
                await self._step()
                backoff.reset()
            except DatabaseUnavailable as error:
                wait = backoff.next()
                log.warning("expiries wait", extra={"error": error, "next_try_seconds": wait})
                await asyncio.sleep(wait)

    async def page(self, client: str, after: Due) -> NoticePage:
        """Return the next of what has been told already, from the table; raise DatabaseUnavailable.

        One page is read at a time, when it is the turn of `client`.
        """
        return await self._reads.read(client, after, partial(self._page, after))

    async def close(self) -> None:
        """End the reads that are under way; called when no stream is left."""
        await self._reads.close()

    async def _step(self) -> None:
        """Tell what is due; else load what comes next; else wait."""
        self._wake.clear()
        now = self.clock()
        schedule = self._schedule
        if now < self._looked_at:
            self._set_back(now, schedule)
        self._looked_at = now
        if dues := schedule.pop(now, CHECKED_AT_ONCE):
            await self._tell(dues, schedule)
        elif schedule.end.at - now < REFILL_SECONDS and 2 * len(schedule) <= self._max_labels:
            await self._load(now, schedule)
        else:
            await self._pause(now, schedule)

    def _set_back(self, now: float, schedule: Schedule) -> None:
        """Begin at `now` once more: what expires between is told again, when it does."""
        log.warning("the clock was set back", extra={"seconds": self._looked_at - now})
        back = Due(now, SEQ_MAX)
        self.told = min(self.told, back)
        schedule.shorten(back)
        for group in self._readers.values():
            for reader in group:
                reader.set_back(now)

    async def _tell(self, dues: list[Due], schedule: Schedule) -> None:
        """Tell which of these have expired in force, or put them back."""
        try:
            notices = await self._check(dues)
        except DatabaseUnavailable:
            for due in dues:
                schedule.add(due)
            raise
        if schedule is not self._schedule:
            # All who had asked are gone, and those who ask now did so later.
            return
        # No await from here: a reader that now finds itself at `told` is told of all that follows.
        told, self.told = self.told, max(self.told, dues[-1])
        for filter, group in tuple(self._readers.items()):
            seen = [n for n in notices if filter is None or filter.matches(*n.looks)]
            if seen:
                late = bisect_right(seen, told, key=_due)
                for reader in tuple(group):
                    reader.tell(seen, late)

    async def _load(self, now: float, schedule: Schedule) -> None:
        """Bring the end of the schedule to the horizon, or to where it is full."""
        begin, end = schedule.end, Due(now + HORIZON_SECONDS, SEQ_MAX)
        # From here on new labels go in up to the new end: those that came before are in the table.
        schedule.extend((), end)
        try:
            dues, reached = await self._earliest(begin, end, schedule.room)
        except BaseException:
            schedule.shorten(begin)
            raise
        schedule.shorten(reached)
        schedule.extend(dues, schedule.end)

    async def _pause(self, now: float, schedule: Schedule) -> None:
        """Wait until something is due, by a clock that may be set meanwhile."""
        due = schedule.end.at - REFILL_SECONDS if schedule.next_at is None else schedule.next_at
        # Timers go by another clock and may be early: not again and again at once.
        seconds = min(max(EARLY_SECONDS, due - now), LOOK_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _page(self, after: Due) -> NoticePage:
        run, schedule = self._run, self._schedule
        if not run.begin <= after < run.end:
            run = Run(after, *await self._earliest(after, self.told, RUN_LABELS))
            if schedule is self._schedule:
                self._run = run
        first = bisect_right(run.dues, after)
        dues = run.dues[first : first + PAGE_LABELS]
        whole = first + len(dues) == len(run.dues)
        return NoticePage(await self._check(dues), run.end if whole else dues[-1])

    async def _earliest(self, after: Due, end: Due, most: int) -> tuple[list[Due], Due]:
        """Return the first of what the table has after one and up to another, and up to where."""
        found: list[Due] = []
        date, seq = _date(after.at - DAY_SECONDS), 0
        while True:
            last_date = _date(end.at + DAY_SECONDS)
            rows = await self._store.expiring(date, seq, last_date, LOAD_ROWS)
            for _, number, exp in rows:
                at = expires_at(exp)
                if at is not None and after < (due := Due(at, number)) <= end:
                    found.append(due)
            found.sort()
            if len(found) > most:
                del found[most:]
                end = found[-1] if found else after
            if len(rows) < LOAD_ROWS:
                return found, end
            date, seq, _ = rows[-1]

    async def _check(self, dues: Sequence[Due]) -> list[Notice]:
        """Return notices of those that are in force now, in order."""
        if not dues:
            return []
        self._checks += 1
        try:
            rows = await self._store.still_in_force([due.seq for due in dues], self._head())
            at = {due.seq: due.at for due in dues}
            notices = [
                self._notice(at[row.seq], row)
                for row in rows
                # Rows below the floor stay for as long as a sweep takes, or until the next one.
                # What was streamed since the head of the query: a newer one came first.
                if row.seq >= self._floor() and self._newer.get(row.key, 0) <= row.seq
            ]
        finally:
            self._checks -= 1
            if not self._checks:
                self._newer.clear()
        return sorted(notices, key=_due)

    def _notice(self, at: float, row: Row) -> Notice:
        """Return the notice of a row, the one that others wait for if there is any."""
        key = row.key
        notice = self._alive.get(key)
        if notice is None or notice.seq != row.seq:
            notice = Notice(at, row)
            self._alive[key] = notice
        return notice


def _due(notice: Notice) -> Due:
    return Due(notice.at, notice.seq)


def _date(at: float) -> str:
    if at < FIRST_TIME:
        return "0000-01-01"
    return datetime.fromtimestamp(at, UTC).date().isoformat()
