"""The expiry: sends a notice to each reader when a label in force expires. One per process.

Promises: each label that is in force when it expires is reported once to each reader, in the order
of the times. Notices may be late while the database is away or slow, but none is lost. Without
readers the expiry does nothing.
The sequencer passes new labels to the expiry. It reads older labels from the table. Each stream
that asks for notices has an ExpiryReader.
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

#: The schedule holds the labels that expire within this time.
HORIZON_SECONDS = 3600.0
#: The next labels are loaded this long before the schedule ends: on Ozone's table that is a scan.
REFILL_SECONDS = 300.0
#: Labels in the schedule, about 120 bytes each. When more labels expire, it ends earlier.
SCHEDULE_MAX_LABELS = 100_000
#: Rows read at once for the schedule: 5 ms of the event loop.
LOAD_ROWS = 5000
#: Labels checked and reported at once.
CHECKED_AT_ONCE = 500
#: Labels in a page of notices from the table.
PAGE_LABELS = 2000
#: Labels of several pages that are searched at once: a search reads three days at least.
RUN_LABELS = 20_000
#: A change of the system's clock is noticed within this time.
LOOK_SECONDS = 5.0
#: The clock is read at most this often.
EARLY_SECONDS = 0.001
#: The date in `exp` differs from the date in UTC by less than this: an offset is below one day.
DAY_SECONDS = 86_400.0
#: 0001-01-01T00:00:00Z, the first time that Python's datetime supports.
FIRST_TIME = -62_135_596_800.0

LabelKey = tuple[str, str, str, str]


class NoticeConsumer(Protocol):
    """Receives notices. No method may await or raise; each may unsubscribe."""

    def report(self, notices: Sequence[Notice], late: int) -> None:
        """Take notices of labels that have just expired, in order.

        The first `late` of them are late: labels that expired after them were reported before.
        """

    def set_back(self, now: float) -> None:
        """Take notices of all labels that expire after `now`: the clock was set back to `now`."""


class NoticePage(NamedTuple):
    """Notices of labels that expired up to `end` and were in force."""

    notices: list[Notice]
    end: Due


class Run(NamedTuple):
    """All labels that expire after `begin` and up to `end`, in force or not."""

    begin: Due
    dues: list[Due]
    end: Due


#: Before all times.
NEVER = Due(-inf, 0)
#: The run before the first search.
EMPTY_RUN = Run(NEVER, [], NEVER)


class Expiry:
    """Keeps the schedule while there are readers. `run` is its only task."""

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
        """`clock` returns seconds since 1970; it may be set. No label below `floor` is reported."""
        self._store = store
        self._head = head
        self._floor = floor
        self._max_labels = max_labels
        self._readers: dict[Filter | None, dict[NoticeConsumer, None]] = {}
        self._has_readers = asyncio.Event()
        self._wake = asyncio.Event()
        self._schedule = Schedule(NEVER, max_labels)
        #: Notices that a reader still holds, by the key with which a newer label replaces them.
        self._held: WeakValueDictionary[LabelKey, Notice] = WeakValueDictionary()
        #: The number of running checks, and the labels that were streamed during these checks.
        self._checks = 0
        self._newer: dict[LabelKey, int] = {}
        #: Pages are slices of this run. Labels stored later are reported to readers as late.
        self._run = EMPTY_RUN
        self._reads = Reads(1)
        self.clock = clock
        #: The time that the clock showed last.
        self._last_now = 0.0
        #: All labels due up to here have been reported, except those that were not stored yet.
        self.reported = NEVER
        metrics.gauges["expiries_scheduled"] = lambda: len(self._schedule)

    def subscribe(self, reader: NoticeConsumer, filter: Filter | None, now: float) -> None:
        """Report to `reader` all labels that expire from now on and match `filter`."""
        if not self._readers:
            self.reported = Due(now, SEQ_MAX)
            self._schedule = Schedule(self.reported, self._max_labels)
            self._last_now = now
            self._has_readers.set()
        self._readers.setdefault(filter, {})[reader] = None

    def unsubscribe(self, reader: NoticeConsumer, filter: Filter | None) -> None:
        """Report no more labels to `reader`. Without a subscription, nothing happens."""
        group = self._readers.get(filter, {})
        if reader not in group:
            return
        del group[reader]
        if not group:
            del self._readers[filter]
        if not self._readers:
            self._has_readers.clear()
            # A new schedule: a read that is still running fills the old one, which is not used.
            self._schedule = Schedule(NEVER, self._max_labels)
            self._run = EMPTY_RUN
            self.wake()

    def wake(self) -> None:
        """Read the clock now."""
        self._wake.set()

    def take(self, rows: Sequence[Row]) -> None:
        """Schedule labels that the sequencer is about to stream. Mark notices that they replace."""
        if not (self._readers or self._checks):
            return
        for row in rows:
            key = row.key
            if self._checks:
                self._newer[key] = row.seq
            before = self._held.get(key)
            if before is not None:
                before.superseded = True
            at = None if row.neg else expires_at(row.exp)
            if at is not None and self._schedule.add(Due(at, row.seq)):
                self.wake()

    async def run(self) -> None:
        """Report until cancelled. While the database is away, try again."""
        backoff = Backoff()
        while True:
            await self._has_readers.wait()
            try:
                await self._step()
                backoff.reset()
            except DatabaseUnavailable as error:
                wait = backoff.next()
                log.warning("expiries wait", extra={"error": error, "next_try_seconds": wait})
                await asyncio.sleep(wait)

    async def page(self, client: str, after: Due) -> NoticePage:
        """Return the next page after `after` of labels that have been reported, from the table.

        One page is read at a time, at the turn of `client`. Raises DatabaseUnavailable.
        """
        return await self._reads.read(client, after, partial(self._page, after))

    async def close(self) -> None:
        """Cancel the reads in progress. Called when no stream is left."""
        await self._reads.close()

    async def _step(self) -> None:
        """Report due labels. If there are none, load the next ones, or wait."""
        self._wake.clear()
        now = self.clock()
        schedule = self._schedule
        if now < self._last_now:
            self._set_back(now, schedule)
        self._last_now = now
        if dues := schedule.pop(now, CHECKED_AT_ONCE):
            await self._report(dues, schedule)
        elif schedule.end.at - now < REFILL_SECONDS and 2 * len(schedule) <= self._max_labels:
            await self._load(now, schedule)
        else:
            await self._pause(now, schedule)

    def _set_back(self, now: float, schedule: Schedule) -> None:
        """Begin at `now` again: labels that expire after `now` are reported again at that time."""
        log.warning("the clock was set back", extra={"seconds": self._last_now - now})
        back = Due(now, SEQ_MAX)
        self.reported = min(self.reported, back)
        schedule.shorten(back)
        for group in self._readers.values():
            for reader in group:
                reader.set_back(now)

    async def _report(self, dues: list[Due], schedule: Schedule) -> None:
        """Report those of `dues` that are in force. On an error, put all back."""
        try:
            notices = await self._check(dues)
        except DatabaseUnavailable:
            for due in dues:
                schedule.add(due)
            raise
        if schedule is not self._schedule:
            # All readers of that time have left. The current readers subscribed later.
            return
        # No await from here: a reader that has read up to `reported` receives all later notices.
        before, self.reported = self.reported, max(self.reported, dues[-1])
        for filter, group in tuple(self._readers.items()):
            matching = [n for n in notices if filter is None or filter.matches(*n.filter_key)]
            if matching:
                late = bisect_right(matching, before, key=_due)
                for reader in tuple(group):
                    reader.report(matching, late)

    async def _load(self, now: float, schedule: Schedule) -> None:
        """Extend the schedule up to the horizon, or until it is full."""
        begin, end = schedule.end, Due(now + HORIZON_SECONDS, SEQ_MAX)
        # From now on `take` adds new labels up to the new end. Earlier labels are in the table.
        schedule.extend((), end)
        try:
            dues, reached = await self._earliest(begin, end, schedule.room)
        except BaseException:
            schedule.shorten(begin)
            raise
        schedule.shorten(reached)
        schedule.extend(dues, schedule.end)

    async def _pause(self, now: float, schedule: Schedule) -> None:
        """Wait until a label is due. The clock may be set during the wait."""
        due = schedule.end.at - REFILL_SECONDS if schedule.next_at is None else schedule.next_at
        # Timers use another clock and may be early. The minimum avoids a busy loop.
        seconds = min(max(EARLY_SECONDS, due - now), LOOK_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _page(self, after: Due) -> NoticePage:
        run, schedule = self._run, self._schedule
        if not run.begin <= after < run.end:
            run = Run(after, *await self._earliest(after, self.reported, RUN_LABELS))
            if schedule is self._schedule:
                self._run = run
        first = bisect_right(run.dues, after)
        dues = run.dues[first : first + PAGE_LABELS]
        whole = first + len(dues) == len(run.dues)
        return NoticePage(await self._check(dues), run.end if whole else dues[-1])

    async def _earliest(self, after: Due, end: Due, most: int) -> tuple[list[Due], Due]:
        """Return the first `most` of the table after `after` and up to `end`.

        Also returns the end of the search: all labels up to it were returned.
        """
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
        """Return notices of the labels that are in force now, in order."""
        if not dues:
            return []
        self._checks += 1
        try:
            rows = await self._store.still_in_force([due.seq for due in dues], self._head())
            at = {due.seq: due.at for due in dues}
            notices = [
                self._notice(at[row.seq], row)
                for row in rows
                # Rows below the floor may stay until the next sweep. `_newer` has the labels that
                # were streamed after the query's head: a newer label replaces the row.
                if row.seq >= self._floor() and self._newer.get(row.key, 0) <= row.seq
            ]
        finally:
            self._checks -= 1
            if not self._checks:
                self._newer.clear()
        return sorted(notices, key=_due)

    def _notice(self, at: float, row: Row) -> Notice:
        """Return the notice of a row. Readers share one notice."""
        key = row.key
        notice = self._held.get(key)
        if notice is None or notice.seq != row.seq:
            notice = Notice(at, row)
            self._held[key] = notice
        return notice


def _due(notice: Notice) -> Due:
    return Due(notice.at, notice.seq)


def _date(at: float) -> str:
    if at < FIRST_TIME:
        return "0000-01-01"
    return datetime.fromtimestamp(at, UTC).date().isoformat()
