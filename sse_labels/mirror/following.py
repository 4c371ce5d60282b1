"""The mirror: follows one upstream and stores its labels here, each once.

Promises: the upstream's cursor and the labels before it are stored in one transaction, so that
whatever dies, nothing is lost and nothing doubled; one process follows an upstream, and another
takes over when that one ends; an upstream that began anew is read from its beginning, and what
is in force there is in force here after that.
Stands before the corridor: upstream -> following -> storing -> label row -> store -> …
Does not belong here: frames and labels on the way in (`upstream`), SQL (`storing`).
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

#: What an upstream may be ahead of the database; then it is read no further.
WAITING_MAX_BYTES = 8 * 1024**2
#: Labels stored in one transaction, about 20 ms of PostgreSQL's time.
BATCH_MAX_LABELS = 1000
#: How often an upstream has to say that a cursor lies in its future before it is believed: one of
#: several servers may be a moment behind.
FUTURE_TRIES = 3
RETRY_FIRST_SECONDS = 0.5
#: Lines in a minute about what an upstream says, and about its labels; all of it is counted.
LINES_MAX = 20
#: Labels that are set aside and kept in a minute, and of an upstream in all; all are counted.
ASIDE_MAX = 1000
#: How often in a minute labels that came let a lost upstream be tried again at once.
QUICK_TRIES = 10
#: How often somebody looks whether the process that follows an upstream is still there.
LOCKED_SECONDS = 5.0
#: Counts that the log reports.
REPORTED = ("stored", "known", "set_aside", "own", "repeated", "reconnects", "lines_left_out")


class CursorMoved(DatabaseUnavailable):
    """Somebody else moved this upstream's cursor meanwhile; nothing was stored."""


class Mirror:
    """Follows one upstream; `run` is its task, and `report` another that tells of it."""

    def __init__(
        self,
        upstream: Upstream,
        connect: Callable[[], Awaitable[Connection]],
        *,
        first_cursor: int = 0,
        retry_longest_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`connect` gives a session of the database; `first_cursor` is for a new upstream.

        Between two tries it waits longer each time, `retry_longest_seconds` at most.
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
        #: Whether the next wait is to be longer than the first.
        self._waited = False
        #: What happened since the start.
        self.tally: Counter[str] = Counter()
        #: The last seq of the upstream's that is taken.
        self.cursor = first_cursor

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            begun = self._clock()
            hint = 0.0
            try:
                await self._follow()
            except NotRead as error:
                # Also what was refused is asked again: whoever runs the upstream may mend that.
                sentence, lost = "no upstream", str(error)
                hint = min(error.after_seconds, HINT_MAX_SECONDS)
            except CursorMoved as error:
                sentence, lost = "somebody else moved the cursor", str(error)
            except DatabaseUnavailable as error:
                sentence, lost = "no database", " ".join(str(error).split())
            except DatabaseRefused as error:
                if not error.of_values:
                    raise
                # A constraint or a trigger says no to these labels; the others' go on.
                sentence, lost = "the database takes no labels of this upstream", str(error)
            except Exception as error:
                # Whatever one upstream makes of us, the others are followed on.
                log.exception("following failed", extra={"upstream": self._upstream.url})
                sentence, lost = "following failed", repr(error)[:WORDS_MAX]
            self.tally["reconnects"] += 1
            if self._clock() - begun > self._retry_longest_seconds:
                # It went well for long, however quiet it was.
                self._backoff.reset()
            wait = hint + self._backoff.next()
            self._waited = True
            self._log(
                logging.WARNING, sentence, cursor=self.cursor, error=lost, next_try_seconds=wait
            )
            await asyncio.sleep(wait)

    async def report(self, every_seconds: float) -> None:
        """Log what was done, whenever something was, until cancelled; and at the end."""
        told = self.cursor, self.tally["lines_left_out"]
        try:
            while True:
                await asyncio.sleep(every_seconds)
                if (self.cursor, self.tally["lines_left_out"]) != told:
                    told = self.cursor, self.tally["lines_left_out"]
                    self._report("mirrored")
        finally:
            self._report("stopping")

    def _report(self, sentence: str) -> None:
        counts = {name: self.tally[name] for name in REPORTED}
        counts["left_out"] = self._upstream.left_out
        self._log(logging.INFO, sentence, cursor=self.cursor, **counts)

    def _log(self, level: int, sentence: str, **fields: object) -> None:
        log.log(level, sentence, extra={"upstream": self._upstream.url, **fields})

    def _say(self, level: int, sentence: str, **fields: object) -> None:
        """Log what an upstream caused, unless there were too many such lines in this minute."""
        if self._lines.take():
            self._log(level, sentence, **fields)
        else:
            self.tally["lines_left_out"] += 1

    async def _follow(self) -> None:
        """Follow once; raise NotRead or DatabaseUnavailable at the end of it."""
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
                    await self._begin_anew(store, error.name)
                else:
                    self._denied = 0
                raise
        finally:
            session.close()

    async def _lock(self, store: UpstreamStore) -> None:
        told = False
        while not await store.try_lock():
            if not told:
                self._log(logging.INFO, "another process follows this upstream")
            told = True
            await asyncio.sleep(LOCKED_SECONDS)

    async def _begin_anew(self, store: UpstreamStore, name: str) -> None:
        """Rewind, unless it may be one of several servers that is a moment behind."""
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
                raise Lost("it streams this very database: each label would come again")
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
        """Let what comes wait to be stored, and behind it the end, which is raised there."""
        try:
            while True:
                message = await connection.next()
                if isinstance(message, Labels):
                    await waiting.put(message)
                elif isinstance(message, News):
                    self._tell(message)
        except NotRead as error:
            await waiting.put(error)
        except Exception as error:
            log.exception("reading failed", extra={"upstream": self._upstream.url})
            await waiting.put(Lost(f"reading failed: {error!r}"))

    def _tell(self, news: News) -> None:
        if news.name == "OutdatedCursor":
            self.tally["outdated"] += 1
            self._say(
                logging.WARNING,
                "labels after the cursor are gone at the upstream, what it has left follows",
                cursor=self.cursor,
                said=news.message,
            )
        else:
            self._say(logging.INFO, "news", kind=news.name, said=news.message)

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
            raise CursorMoved(f"it stands no longer at {self.cursor}")
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
            self._say(
                logging.WARNING,
                "labels of this database's own sources are left out",
                seq=until,
                labels=stored.own,
            )
        for each in aside:
            self._say(
                logging.WARNING,
                "a label is set aside",
                seq=each.seq,
                place=each.place,
                reason=each.reason,
            )


class Waiting(asyncio.Queue[Labels | NotRead]):
    """Messages that wait to be stored, bounded in bytes; whoever puts one waits while it is full.

    The end of the connection waits behind them.
    """

    _queue: deque[Labels | NotRead]

    async def batch(self, max_labels: int) -> list[Labels]:
        """Wait for messages, and return about `max_labels` labels; raise the end."""
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
