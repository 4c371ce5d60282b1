"""The expiry reader: collects the notices for one stream, first from the table, then live.

Promises: a label that expired after the given time and is still in force is reported once, from the
table, at the stream's pace. Labels that expire later are reported live. A notice is left out when a
newer label has replaced its label. At the change to live, and after the clock was set back, a
notice may come twice. No notice is lost.
The outbox takes the notices after it has sent the labels.
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
    """Collects notices from `begin` to `leave`. Not reusable."""

    __slots__ = (
        "__weakref__", "_client", "_expiry", "_filter", "_live", "_mark", "_on_news", "_page",
        "_reading", "_since", "_waiting",
    )  # fmt: skip

    def __init__(self, expiry: Expiry, client: str, filter: Filter | None, since: float) -> None:
        """Collect labels that expire after `since`, in seconds since 1970."""
        self._expiry = expiry
        self._client = client
        self._filter = filter
        self._since = since
        #: Labels that expired up to here have been read, or are not asked for.
        self._mark = Due(since, SEQ_MAX)
        self._live = False
        self._reading: asyncio.Task[NoticePage] | None = None
        #: Notices of a page of the table that have not been taken.
        self._page: list[Notice] = []
        #: Live notices that have not been taken.
        self._waiting: list[Notice] = []
        self._on_news: Callable[[], None] = _nothing

    def __len__(self) -> int:
        """Return the number of waiting live notices."""
        return len(self._waiting)

    def begin(self, on_news: Callable[[], None]) -> None:
        """Subscribe. `on_news` is called when there may be notices to take."""
        now = self._expiry.clock()
        self._since = min(self._since, now)
        self._mark = Due(self._since, SEQ_MAX)
        self._on_news = on_news
        self._expiry.subscribe(self, self._filter, now)

    def leave(self) -> None:
        """Unsubscribe, and free the waiting notices."""
        self._expiry.unsubscribe(self, self._filter)
        self._on_news = _nothing
        self._page, self._waiting = [], []
        if self._reading is not None:
            self._reading.cancel()

    def report(self, notices: Sequence[Notice], late: int) -> None:
        """Take notices of labels that have just expired. Called by the expiry."""
        if not self._live:
            # The table will return the others. A late label may be before the mark.
            notices = notices[:late]
        fresh = [notice for notice in notices if notice.at > self._since]
        if fresh:
            self._waiting += fresh
            self._on_news()

    def set_back(self, now: float) -> None:
        """Take notices of all labels that expire after `now`. Called by the expiry."""
        self._since = min(self._since, now)

    def take(self, most: int) -> list[Notice]:
        """Return the next notices, at most `most`. Called while the stream is live."""
        while True:
            if not (self._page or self._live):
                self._next_page()
            waiting = self._page or (self._waiting if self._live else [])
            if not waiting:
                return []
            taken = [notice for notice in waiting[:most] if not notice.superseded]
            del waiting[:most]
            if taken:
                return taken

    def _next_page(self) -> None:
        """Take a page that has been read. Then start the next read, or become live."""
        if self._reading is not None:
            if not self._reading.done():
                return
            page, self._reading = self._reading.result(), None
            self._mark = page.end
            matches = None if self._filter is None else self._filter.matches
            self._page = [n for n in page.notices if matches is None or matches(*n.filter_key)]
        # No await between this check and `_live`: the reader receives all notices that come later.
        if self._mark >= self._expiry.reported:
            self._live = True
        else:
            self._reading = asyncio.create_task(self._read(), name=f"expired after {self._mark.at}")
            self._reading.add_done_callback(self._on_read)

    def _on_read(self, reading: asyncio.Task[NoticePage]) -> None:
        if not reading.cancelled():
            # If the stream has left, nobody else retrieves the error.
            reading.exception()
        self._on_news()

    async def _read(self) -> NoticePage:
        """Read one page. While the database is away, try again: the stream must survive this."""
        backoff = Backoff()
        while True:
            try:
                return await self._expiry.page(self._client, self._mark)
            except DatabaseRefused as error:
                # Each of 15,000 streams may log this line. `caused_by` limits them together.
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
    """Do nothing: the stream has not begun, or has left."""
