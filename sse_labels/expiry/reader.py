"""The expiry reader: what one stream is told of expiries, from its time on to now, then live.

Promises: all that expired after its time and is still in force comes once, from the table at the
stream's pace, and then what expires from then on; what a newer label has superseded meanwhile is
left out. At least once at the seams, and never not at all.
Stands between the expiry, which it asks, and the outbox, which takes when labels have come first.
Does not belong here: when it is its turn; how much may wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from sse_labels.backoff import Backoff
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable, HistoryRefused
from sse_labels.expiry.expiry import Expiry, NoticePage
from sse_labels.expiry.schedule import Due
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.notice import Notice
from sse_labels.protocol.seq import SEQ_MAX

log = logging.getLogger(__name__)


class ExpiryReader:
    """Asks while it is between `begin` and `leave`; not reusable."""

    __slots__ = (
        "__weakref__",
        "_client",
        "_expiry",
        "_filter",
        "_live",
        "_mark",
        "_on_news",
        "_page",
        "_reading",
        "_since",
        "_waiting",
    )  # fmt: skip

    def __init__(self, expiry: Expiry, client: str, filter: Filter | None, since: float) -> None:
        """Tell of what expires after `since`, in seconds since 1970; of none before `begin`."""
        self._expiry = expiry
        self._client = client
        self._filter = filter
        self._since = since
        #: What expired up to here has been read, or is not asked for.
        self._mark = Due(since, SEQ_MAX)
        self._live = False
        self._reading: asyncio.Task[NoticePage] | None = None
        #: Of a page from the table, what has not been taken.
        self._page: list[Notice] = []
        #: What came live.
        self._waiting: list[Notice] = []
        self._on_news: Callable[[], None] = _nothing

    def __len__(self) -> int:
        """Return how many wait that came live."""
        return len(self._waiting)

    def begin(self, on_news: Callable[[], None]) -> None:
        """Ask; `on_news` is called when there may be something to take."""
        now = self._expiry.clock()
        self._since = min(self._since, now)
        self._mark = Due(self._since, SEQ_MAX)
        self._on_news = on_news
        self._expiry.ask(self, self._filter, now)

    def leave(self) -> None:
        """Be told nothing more, and free what waits."""
        self._expiry.leave(self, self._filter)
        self._on_news = _nothing
        self._page, self._waiting = [], []
        if self._reading is not None:
            self._reading.cancel()

    def tell(self, notices: Sequence[Notice], late: int) -> None:
        """Take what has just expired; called by the expiry."""
        if not self._live:
            # The rest is found in the table; what came late may lie before the mark.
            notices = notices[:late]
        fresh = [notice for notice in notices if notice.at > self._since]
        if fresh:
            self._waiting += fresh
            self._on_news()

    def set_back(self, now: float) -> None:
        """Take what expires after `now`, too; called by the expiry."""
        self._since = min(self._since, now)

    def take(self, most: int) -> list[Notice]:
        """Return what is to be told now, at most so many; called while the stream is live."""
        while True:
            if not (self._page or self._live):
                self._go_on()
            waiting = self._page or (self._waiting if self._live else [])
            if not waiting:
                return []
            told = [notice for notice in waiting[:most] if not notice.superseded]
            del waiting[:most]
            if told:
                return told

    def _go_on(self) -> None:
        """Take a page that has been read, and find what comes next: another one, or live."""
        if self._reading is not None:
            if not self._reading.done():
                return
            page, self._reading = self._reading.result(), None
            self._mark = page.end
            matches = None if self._filter is None else self._filter.matches
            self._page = [n for n in page.notices if matches is None or matches(*n.looks)]
        # Nothing awaits between this look and being live: what is told next reaches it.
        if self._mark >= self._expiry.told:
            self._live = True
        else:
            self._reading = asyncio.create_task(self._read(), name=f"expired after {self._mark.at}")
            self._reading.add_done_callback(self._has_read)

    def _has_read(self, reading: asyncio.Task[NoticePage]) -> None:
        if not reading.cancelled():
            # Whoever leaves does not look at the error, and it is no surprise.
            reading.exception()
        self._on_news()

    async def _read(self) -> NoticePage:
        """Read one page, as often as it takes: the stream outlives its database."""
        backoff = Backoff()
        while True:
            try:
                return await self._expiry.page(self._client, self._mark)
            except DatabaseRefused as error:
                # Each of 15,000 streams may cause such a line: they are limited together.
                log.error(
                    "expiries may not be read", extra={"error": error, "caused_by": "expiries"}
                )
                raise HistoryRefused from error
            except DatabaseUnavailable as error:
                wait = backoff.next()
                log.info(
                    "expiries are not read yet",
                    extra={"error": error, "next_try_seconds": wait, "caused_by": "expiries"},
                )
                await asyncio.sleep(wait)


def _nothing() -> None:
    """Nobody is to be told."""
