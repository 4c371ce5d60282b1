"""The writers: several at the same time, each with its own random numbers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg2
from psycopg2.extras import execute_values

from oracle import chance
from oracle.consumers import AUTHORS, SOURCES, VALUES
from oracle.verdict import Entry, Published
from oracle.wire import post_labels

#: Texts that a careless encoder of frames would write as separate lines or frames.
NASTY = ["", "", "", "\n\nid: 1\ndata: {}\n\n", "\r", "\u2028", "ä\U0001f98b", '"\\', "</script>"]
COLUMNS = ("src", "uri", "cid", "val", "neg", "cts", "exp", "sig")


class Writer(threading.Thread):
    """Writes rows with plain SQL; commits may come late or not at all, in every possible way."""

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
        # Only letters and digits: part of a record key, and of a transaction's name.
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
        """After the thread's end: end its prepared transactions, so that all labels settle."""
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
                # While this transaction waits, others take later ids and commit.
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
        connection.commit()  # Resets psycopg2's state; PostgreSQL has the transaction now.
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
    """Publishes over HTTP; sends each request, with its key, until it is answered."""

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
        """Publish until `stop` is set; the last request is repeated for at most 10 s more."""
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
        """Send an answered request again, as after a lost answer; the answer must be the same."""
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
    """A label that `POST /labels` accepts; `mark` makes its URI unique."""
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
    """Follows by `id > last`, which loses labels; the oracle must notice."""

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
