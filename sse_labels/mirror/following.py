"""The mirror follows one upstream, and stores each of its labels once.

Promises: the upstream's cursor and the labels before it are stored in one transaction, so a crash
neither loses nor doubles a label. One process follows an upstream, and another process takes over
when the first one ends. If an upstream began anew, it is read from its beginning. After that the
same labels are in force in both databases.
Does not belong here: frames and received labels (`upstream`), SQL (`storing`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable

from sse_labels.backoff import Backoff
from sse_labels.client.answers import WORDS_MAX
from sse_labels.client.retries import BEGAN_ANEW, HINT_MAX_SECONDS, Lost, NotRead
from sse_labels.database.connection import Connection
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable
from sse_labels.mirror.bounds import Quota
from sse_labels.mirror.storing import Place, UpstreamStore
from sse_labels.mirror.upstream import Labels, News, Upstream, UpstreamConnection

log = logging.getLogger(__name__)

#: How much may wait to be stored. Above this the upstream is not read further.
WAITING_MAX_BYTES = 8 * 1024**2
#: Labels stored in one transaction, about 20 ms of PostgreSQL's time.
BATCH_MAX_LABELS = 1000
#: How often in a row an upstream must answer FutureCursor before the mirror rewinds: one of
#: several servers may be a moment behind.
FUTURE_TRIES = 3
RETRY_FIRST_SECONDS = 0.5
#: The most log lines in a minute that an upstream can cause. More of them are counted.
LINES_MAX = 20
#: The most labels that are kept aside in a minute, and in total for an upstream. All are counted.
ASIDE_MAX = 1000
#: How often in a minute stored labels reset the wait before the next connection.
QUICK_TRIES = 10
#: How often a waiting process tries to get the lock of an upstream.
LOCKED_SECONDS = 5.0
#: Counts that the log reports.
REPORTED = ("stored", "known", "set_aside", "own", "repeated", "reconnects", "lines_left_out")


class CursorMoved(DatabaseUnavailable):
    """Another process moved this upstream's cursor. Nothing was stored."""


class Mirror:
    """Follows one upstream. `run` is its task, and `report` is a second task that logs counts."""

    def __init__(
        self,
        upstream: Upstream,
        connect: Callable[[], Awaitable[Connection]],
        *,
        first_cursor: int = 0,
        retry_longest_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`connect` returns a database session. `first_cursor` is for a new upstream.

        The waits between tries grow, up to `retry_longest_seconds`.
        """
        self._upstream = upstream
        self._connect = connect
        self._first_cursor = first_cursor
        self._clock = clock
        self._retry_longest_seconds = retry_longest_seconds
        self._backoff = Backoff(
            min(RETRY_FIRST_SECONDS, retry_longest_seconds), retry_longest_seconds
        )
        self._denied = 0
        self._lines = Quota(LINES_MAX, clock)
        self._kept = Quota(ASIDE_MAX, clock)
        self._quick_tries = Quota(QUICK_TRIES, clock)
        #: Whether the mirror has waited since the backoff was reset.
        self._waited = False
        #: Counts since the start.
        self.tally: Counter[str] = Counter()
        #: The last seq of the upstream that is stored.
        self.cursor = first_cursor

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            begun = self._clock()
            hint = 0.0
            try:
                await self._follow()
            except NotRead as error:
                # Also after Refused: the upstream's operator may fix the cause.
                sentence, lost = "no upstream", str(error)
                hint = min(error.after_seconds, HINT_MAX_SECONDS)
            except CursorMoved as error:
                sentence, lost = "somebody else moved the cursor", str(error)
            except DatabaseUnavailable as error:
                sentence, lost = "no database", " ".join(str(error).split())
            except DatabaseRefused as error:
                if not error.of_values:
                    raise
                # A constraint or a trigger refuses these labels. Other upstreams continue.
                sentence, lost = "the database takes no labels of this upstream", str(error)
            except Exception as error:
                # An error with one upstream must not stop the others.
                log.exception("following failed", extra={"upstream": self._upstream.url})
                sentence, lost = "following failed", repr(error)[:WORDS_MAX]
            self.tally["reconnects"] += 1
            if self._clock() - begun > self._retry_longest_seconds:
                # The connection was good for a long time, even without labels.
                self._backoff.reset()
            wait = hint + self._backoff.next()
            self._waited = True
            self._log(
                logging.WARNING, sentence, cursor=self.cursor, error=lost, next_try_seconds=wait
            )
            await asyncio.sleep(wait)

    async def report(self, every_seconds: float) -> None:
        """Log the counts after each change until cancelled, and at the end."""
        reported = self.cursor, self.tally["lines_left_out"]
        try:
            while True:
                await asyncio.sleep(every_seconds)
                if (self.cursor, self.tally["lines_left_out"]) != reported:
                    reported = self.cursor, self.tally["lines_left_out"]
                    self._report("mirrored")
        finally:
            self._report("stopping")

    def _report(self, sentence: str) -> None:
        counts = {name: self.tally[name] for name in REPORTED}
        counts["left_out"] = self._upstream.left_out
        self._log(logging.INFO, sentence, cursor=self.cursor, **counts)

    def _log(self, level: int, sentence: str, **fields: object) -> None:
        log.log(level, sentence, extra={"upstream": self._upstream.url, **fields})

    def _log_limited(self, level: int, sentence: str, **fields: object) -> None:
        """Log a line that an upstream can cause, up to `LINES_MAX` in a minute."""
        if self._lines.take():
            self._log(level, sentence, **fields)
        else:
            self.tally["lines_left_out"] += 1

    async def _follow(self) -> None:
        """Follow until the connection ends. Raises NotRead or a database error."""
        session = await self._connect()
        try:
            store = UpstreamStore(session, self._upstream.url, self._upstream.did)
            await self._lock(store)
            place = await store.place(self._first_cursor)
            self.cursor = place.cursor
            try:
                await self._mirror(store, place)
            except NotRead as error:
                if error.name in BEGAN_ANEW:
                    await self._rewind(store, error.name)
                else:
                    self._denied = 0
                raise
        finally:
            session.close()

    async def _lock(self, store: UpstreamStore) -> None:
        logged = False
        while not await store.try_lock():
            if not logged:
                self._log(logging.INFO, "another process follows this upstream")
            logged = True
            await asyncio.sleep(LOCKED_SECONDS)

    async def _rewind(self, store: UpstreamStore, name: str) -> None:
        """Read from the beginning, unless the upstream's server may be a moment behind."""
        self._denied += 1
        if name == "FutureCursor" and self._denied < FUTURE_TRIES:
            return
        self._denied = 0
        await store.rewind()
        self.tally["rewinds"] += 1
        sentence = "the upstream began anew, and is read from its beginning"
        self._log(logging.WARNING, sentence, cursor=self.cursor)

    async def _mirror(self, store: UpstreamStore, place: Place) -> None:
        async with self._upstream.connected(place.cursor, place.epoch) as connection:
            if connection.epoch and connection.epoch == await store.own_epoch():
                raise Lost("it streams this very database: each label would be stored again")
            if connection.epoch and place.epoch is None:
                await store.note_epoch(connection.epoch)
            self._log(logging.INFO, "mirroring", cursor=place.cursor)
            waiting = Waiting(WAITING_MAX_BYTES)
            reading = asyncio.create_task(self._read(connection, waiting), name="reading upstream")
            try:
                while True:
                    await self._store(store, await waiting.batch(BATCH_MAX_LABELS))
            finally:
                reading.cancel()
                await asyncio.wait({reading})

    async def _read(self, connection: UpstreamConnection, waiting: Waiting) -> None:
        """Put each message into `waiting`, and the error at the end, which `batch` raises."""
        try:
            while True:
                message = await connection.next()
                if isinstance(message, Labels):
                    await waiting.put(message)
                elif isinstance(message, News):
                    self._log_news(message)
        except NotRead as error:
            await waiting.put(error)
        except Exception as error:
            log.exception("reading failed", extra={"upstream": self._upstream.url})
            await waiting.put(Lost(f"reading failed: {error!r}"))

    def _log_news(self, news: News) -> None:
        if news.name == "OutdatedCursor":
            self.tally["outdated"] += 1
            self._log_limited(
                logging.WARNING,
                "the upstream has deleted labels after the cursor, and sends the rest",
                cursor=self.cursor,
                said=news.message,
            )
        else:
            self._log_limited(logging.INFO, "news", kind=news.name, said=news.message)

    async def _store(self, store: UpstreamStore, messages: list[Labels]) -> None:
        new: list[Labels] = []
        for message in messages:
            if message.seq > (new[-1].seq if new else self.cursor):
                new.append(message)
            else:
                self.tally["repeated"] += 1
        if not new:
            return
        labels = [label for message in new for label in message.labels]
        aside = [each for message in new for each in message.aside]
        until = new[-1].seq
        kept = aside[: self._kept.take(len(aside))]
        stored = await store.store(self.cursor, until, labels, kept, len(aside), ASIDE_MAX)
        if stored is None:
            raise CursorMoved(f"the cursor is no longer {self.cursor}")
        self.cursor = until
        self.tally["stored"] += stored.new
        self.tally["own"] += stored.own
        self.tally["known"] += len(labels) - stored.new - stored.own
        self.tally["set_aside"] += len(aside)
        self._denied = 0
        if self._waited and self._quick_tries.take():
            self._waited = False
            self._backoff.reset()
        if stored.own:
            self._log_limited(
                logging.WARNING,
                "labels of this database's own sources are left out",
                seq=until,
                labels=stored.own,
            )
        for each in aside:
            self._log_limited(
                logging.WARNING,
                "a label is set aside",
                seq=each.seq,
                place=each.place,
                reason=each.reason,
            )


class Waiting(asyncio.Queue[Labels | NotRead]):
    """Messages that wait to be stored, bounded in bytes. `put` waits while the queue is full.

    The last item is the error that ended the connection.
    """

    _queue: deque[Labels | NotRead]

    async def batch(self, max_labels: int) -> list[Labels]:
        """Wait for messages, and return those with about `max_labels` labels. Raises NotRead."""
        messages: list[Labels] = []
        labels = 0
        while not messages or (labels < max_labels and not self.empty()):
            message = await self.get() if not messages else self._queue[0]
            if isinstance(message, NotRead):
                if messages:
                    break
                raise message
            if messages:
                self.get_nowait()
            messages.append(message)
            labels += len(message.labels) + len(message.aside)
        return messages

    def _init(self, maxsize: int) -> None:
        self._queue = deque()
        self._bytes = 0

    def _put(self, item: Labels | NotRead) -> None:
        self._queue.append(item)
        self._bytes += _nbytes(item)

    def _get(self) -> Labels | NotRead:
        item = self._queue.popleft()
        self._bytes -= _nbytes(item)
        return item

    def qsize(self) -> int:
        """Return how many bytes wait."""
        return self._bytes


def _nbytes(item: Labels | NotRead) -> int:
    return item.nbytes if isinstance(item, Labels) else 0
