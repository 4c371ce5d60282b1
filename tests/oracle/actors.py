"""Who reads and who writes: several at once, each with random numbers of its own."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2.extras import execute_values

from oracle import chance
from oracle.verdict import Entry, Published
from oracle.wire import EventStream, WireError, exchange, post_labels, stream_target

SOURCES = [f"did:plc:{letter * 24}" for letter in "abcd"]
AUTHORS = [f"did:plc:{letter * 24}" for letter in "wxyz"]
VALUES = ["spam", "porn", "rude", "!hide"]
#: What a careless writer of frames would let through as a line, or as a frame, of its own.
NASTY = ["", "", "", "\n\nid: 1\ndata: {}\n\n", "\r", "\u2028", "ä\U0001f98b", '"\\', "</script>"]
COLUMNS = ("src", "uri", "cid", "val", "neg", "cts", "exp", "sig")


@dataclass(frozen=True)
class Wanted:
    """A consumer's filter, judged here by other code than the service's."""

    sources: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def parameters(self) -> list[tuple[str, str]]:
        """The query that asks for it."""
        return [
            *(("sources", source) for source in self.sources),
            *(("values", value) for value in self.values),
            *(("uriPatterns", pattern) for pattern in self.patterns),
        ]

    def passes(self, label: dict[str, Any]) -> bool:
        """Whether a label, as JSON, is to be seen."""
        return (
            (not self.sources or label["src"] in self.sources)
            and (not self.values or label["val"] in self.values)
            and (not self.patterns or any(_agrees(label["uri"], p) for p in self.patterns))
        )


def _agrees(uri: str, pattern: str) -> bool:
    return uri[: len(pattern) - 1] == pattern[:-1] if pattern[-1] == "*" else uri == pattern


class Consumer:
    """Reads, notes what it read, and comes back with its last id whatever happens."""

    told_of_stopping = True

    def __init__(
        self,
        name: str,
        seed: str,
        port: int,
        *,
        wanted: Wanted | None = None,
        live: bool = False,
        slow: bool = False,
        restless: bool = False,
        shared: dict[str, str],
    ) -> None:
        self.name = name
        self.wanted = wanted or Wanted()
        self.slow = slow
        self.restless = restless
        self.transcript: list[Entry] = []
        #: Everything after this is expected; of a live consumer the stream says it.
        self.start: int | None = None if live else 0
        self.position = 0
        self.streams = 0
        self.heartbeats = 0
        self.ends: Counter[str] = Counter()
        #: By what a stream may end.
        self.allowed = {"ConsumerTooSlow", "ServerStopping", "NotReady"}
        self.complaints: list[str] = []
        self.hurry = False
        self._random = chance(seed, name)
        self._port = port
        self._last_id = ""
        self._retry_seconds = 0.02
        # Equal data of all consumers is one object: a long run fits into memory.
        self._shared = shared

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            try:
                await self._read()
                self.ends["end"] += 1
            except (OSError, TimeoutError) as error:
                self.ends[type(error).__name__] += 1
            except (WireError, UnicodeDecodeError) as error:
                self.complaints.append(f"{self.name}: {error!r}")
            await asyncio.sleep(min(0.2, self._retry_seconds))

    async def _read(self) -> None:
        parameters = self.wanted.parameters()
        headers = [("Accept", "text/event-stream")]
        if self._last_id:
            headers.append(("Last-Event-ID", self._last_id))
        elif self.start is not None:
            parameters.append(("cursor", str(self.start)))
        target = stream_target(parameters)
        buffer = 8192 if self.slow else None
        patience = self._random.uniform(0.05, 3.0) if self.restless and not self.hurry else None
        async with (
            asyncio.timeout(patience),
            exchange(self._port, "GET", target, headers, receive_buffer=buffer) as reply,
        ):
            if reply.status != 200:
                # 503 while it starts or is stopping; anything else is a wrong answer to us.
                if reply.status != 503:
                    body = b"".join([piece async for piece in reply.body()])
                    self.complaints.append(f"{self.name}: {reply.status} {body[:200]!r}")
                return
            stream = EventStream(self._last_id)
            self.streams += 1
            async for piece in reply.body(512 if self.slow and not self.hurry else 65536):
                beats = stream.comments + stream.silent_blocks
                events = stream.feed(piece)
                # Before the labels are taken: the first may come in the same piece as the start.
                if self.start is None and stream.opened_at:
                    self.start = int(stream.opened_at)
                for event in events:
                    self._take(event.kind, event.last_id, event.data)
                self.heartbeats += stream.comments + stream.silent_blocks - beats
                self._last_id = stream.last_id
                if self._last_id:
                    self.position = int(self._last_id)
                if stream.retry_ms is not None:
                    self._retry_seconds = stream.retry_ms / 1000
                if self.slow and not self.hurry:
                    await asyncio.sleep(self._random.uniform(0, 0.02))

    def _take(self, kind: str, last_id: str, data: str) -> None:
        if kind == "message":
            if self.start is None:
                self.complaints.append(f"{self.name}: a label before the stream said its start")
                self.start = 0
            self.transcript.append(Entry(int(last_id), self._shared.setdefault(data, data)))
        elif kind == "error":
            name = data.partition('"error":"')[2].partition('"')[0]
            self.ends[name] += 1
            if name not in self.allowed:
                self.complaints.append(f"{self.name}: {data}")
        elif kind != "info" or not data.startswith(
            ('{"name":"StreamOpened"', '{"name":"CaughtUp"')
        ):
            self.complaints.append(f"{self.name}: {kind} {data}")


class Writer(threading.Thread):
    """Writes rows with plain SQL, in every way in which a commit can come late or not at all."""

    def __init__(
        self, name: str, seed: str, dsn: str, stop: threading.Event, pause_seconds: float
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.transactions = 0
        self.failures = 0
        self._stop_asked = stop
        self._random = chance(seed, name)
        self._dsn = dsn
        self._pause_seconds = pause_seconds
        self._number = 0
        # Letters and digits: part of a record key, and of a transaction's name.
        self._mark = f"{seed}{name}".replace("-", "")

    def run(self) -> None:
        connection = None
        while not self._stop_asked.is_set():
            try:
                if connection is None:
                    connection = psycopg2.connect(self._dsn, connect_timeout=5)
                    self._finish_prepared(connection)
                self._one(connection)
                self.transactions += 1
            except psycopg2.Error:
                self.failures += 1
                if connection is not None:
                    connection.close()
                    connection = None
                self._stop_asked.wait(0.05)
            self._stop_asked.wait(self._random.expovariate(1 / self._pause_seconds))
        if connection is not None:
            connection.close()

    def finish(self) -> None:
        """After the thread's end: no transaction of it stays open, else nothing could settle."""
        connection = psycopg2.connect(self._dsn)
        try:
            self._finish_prepared(connection)
        finally:
            connection.close()

    def _one(self, connection: Any) -> None:
        draw = self._random.random()
        with connection.cursor() as cursor:
            if draw < 0.12:
                self._two_phases(connection, cursor)
                return
            self._insert(cursor)
            if draw < 0.25:
                cursor.execute("SAVEPOINT here")
                self._insert(cursor)
                if self._random.random() < 0.6:
                    cursor.execute("ROLLBACK TO SAVEPOINT here")
                self._insert(cursor)
            if draw < 0.6:
                # While this one waits, others take later ids and commit.
                self._stop_asked.wait(self._random.expovariate(1 / 0.05))
                self._insert(cursor)
        if self._random.random() < 0.15:
            connection.rollback()
        else:
            connection.commit()

    def _two_phases(self, connection: Any, cursor: Any) -> None:
        name = f"{self._mark}x{self._number}"
        self._insert(cursor)
        cursor.execute("PREPARE TRANSACTION %s", (name,))
        connection.commit()  # psycopg2's own state; the transaction is PostgreSQL's now.
        self._stop_asked.wait(self._random.expovariate(1 / 0.05))
        self._end_prepared(connection, name)

    def _end_prepared(self, connection: Any, name: str) -> None:
        connection.autocommit = True
        with connection.cursor() as cursor:
            word = "ROLLBACK" if self._random.random() < 0.2 else "COMMIT"
            cursor.execute(f"{word} PREPARED %s", (name,))
        connection.autocommit = False

    def _finish_prepared(self, connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
                " AND starts_with(gid, %s)",
                (f"{self._mark}x",),
            )
            names = [name for (name,) in cursor.fetchall()]
        connection.rollback()
        for name in names:
            self._end_prepared(connection, name)

    def _insert(self, cursor: Any) -> None:
        count = 1 if self._random.random() < 0.7 else self._random.randint(2, 12)
        rows = [self._row() for _ in range(count)]
        execute_values(cursor, f"INSERT INTO label ({', '.join(COLUMNS)}) VALUES %s", rows)

    def _row(self) -> tuple[Any, ...]:
        rnd = self._random
        self._number += 1
        return (
            rnd.choice(SOURCES),
            f"at://{rnd.choice(AUTHORS)}/app.bsky.feed.post/{self._mark}{self._number}"
            + rnd.choice(NASTY),
            rnd.choice(("", "bafyreiabc")),
            rnd.choice(VALUES) + (rnd.choice(NASTY) if rnd.random() < 0.1 else ""),
            rnd.choice((None, False, True)),
            "2026-01-01T00:00:00.000Z",
            rnd.choice((None, None, "2030-01-01T00:00:00Z")),
            None if rnd.random() < 0.7 else psycopg2.Binary(rnd.randbytes(rnd.randint(1, 64))),
        )


class Publisher:
    """Publishes over HTTP, each request with a key, again and again until it is answered."""

    def __init__(
        self, name: str, seed: str, port: int, token: str, stop: threading.Event, pause: float
    ) -> None:
        self.name = name
        self.requests: list[Published] = []
        self.complaints: list[str] = []
        self.refused: Counter[str] = Counter()
        self._mark = f"{seed}{name}".replace("-", "")
        self._random = chance(seed, name)
        self._port = port
        self._token = token
        self._stop_asked = stop
        self._pause_seconds = pause

    async def run(self) -> None:
        """Publish until told to stop; the last request is seen through, for a while."""
        while not self._stop_asked.is_set():
            await self._publish()
            await asyncio.sleep(self._random.expovariate(1 / self._pause_seconds))

    async def _publish(self) -> None:
        number = len(self.requests)
        labels = [label_for(self._random, f"{self._mark}n{number}i{index}")
                  for index in range(self._random.choice((1, 1, 2, 5)))]  # fmt: skip
        request = Published(f"{self._mark}n{number}", [str(label["uri"]) for label in labels])
        self.requests.append(request)
        loop = asyncio.get_running_loop()
        give_up = None
        while request.seqs is None and (give_up is None or loop.time() < give_up):
            if self._stop_asked.is_set() and give_up is None:
                give_up = loop.time() + 10
            request.tries += 1
            try:
                status, answer = await post_labels(self._port, self._token, labels, request.key)
            except (OSError, TimeoutError) as error:
                self.refused[type(error).__name__] += 1
            else:
                if status == 201:
                    request.seqs = answer["seqs"]
                    if self._random.random() < 0.1:
                        await self._again(request, labels)
                    return
                self.refused[str(status)] += 1
                if status != 503:
                    self.complaints.append(f"{request.key}: {status} {answer}")
                    return
            await asyncio.sleep(self._random.uniform(0.02, 0.1))

    async def _again(self, request: Published, labels: list[dict[str, Any]]) -> None:
        """A client that did not see its answer: it must get the same one."""
        try:
            status, answer = await post_labels(self._port, self._token, labels, request.key)
        except (OSError, TimeoutError) as error:
            self.refused[type(error).__name__] += 1
            return
        if status != 201:
            self.refused[str(status)] += 1
        elif answer["seqs"] != request.seqs:
            self.complaints.append(f"{request.key}: {request.seqs} and then {answer['seqs']}")


def label_for(rnd: random.Random, mark: str) -> dict[str, Any]:
    """A label that `POST /labels` takes; `mark` makes its URI one of its own."""
    label = {
        "src": rnd.choice(SOURCES),
        "uri": f"at://{rnd.choice(AUTHORS)}/app.bsky.feed.post/{mark}",
        "val": rnd.choice(VALUES),
        "cts": "2026-01-01T00:00:00.000Z",
    }
    if rnd.random() < 0.3:
        label["neg"] = True
    return label


class BrokenFollower(threading.Thread):
    """Follows by `id > last`, as one would at first: what the oracle must find out."""

    def __init__(self, fetch: Callable[[int], list[Entry]], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.transcript: list[Entry] = []
        self._fetch = fetch
        self._stop_asked = stop

    def run(self) -> None:
        last = 0
        while True:
            ending = self._stop_asked.is_set()
            for entry in self._fetch(last):
                self.transcript.append(entry)
                last = entry.seq
            if ending:
                return
            self._stop_asked.wait(0.002)
