"""The stage: PostgreSQL, a proxy, the program, consumers and writers of one run."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from oracle.consumers import SOURCES, VALUES, Consumer, Wanted
from oracle.databases import new_database
from oracle.hooks import Hooks
from oracle.proxy import Proxy, unix_socket_of
from oracle.sockets import SocketConsumer
from oracle.verdict import Injection, Verdict, judge, judge_published
from oracle.wire import get
from oracle.writers import Publisher, Writer
from sse_labels.embedded import EmbeddedPostgres

from support.database import (
    TestDatabase,
    expected_event,
    insert_with,
    reachable_directory,
    until,
)
from support.program import REPOSITORY, Program, free_port

TOKEN = "oracle-publish-token"
PATIENCE_SECONDS = 30.0
HEARTBEAT_SECONDS = 0.5
QUERY_TIMEOUT_SECONDS = 1.5
OPTIONS = {
    "poll-seconds": "0.2",
    "heartbeat-seconds": str(HEARTBEAT_SECONDS),
    "retry-min-seconds": "0.01",
    "retry-max-seconds": "0.05",
    "query-timeout-seconds": str(QUERY_TIMEOUT_SECONDS),
    "connect-timeout-seconds": "1",
    "send-timeout-seconds": "3",
    "slow-grace-seconds": "0.5",
    "page-max-events": "50",
    "outbox-max-events": "2000",
}


class Stage:
    """All parts of one run; `async with staged(…)` makes them."""

    def __init__(
        self,
        postgres: EmbeddedPostgres,
        database: TestDatabase,
        proxy: Proxy,
        directory: Path,
        seed: str,
        options: dict[str, str],
        pause_seconds: float,
    ) -> None:
        self.postgres = postgres
        self.database = database
        self.proxy = proxy
        self.seed = seed
        self.port = free_port()
        #: The port of the consumers: the program's, or that of a proxy before it.
        self.front_port = self.port
        self.injections: list[Injection] = []
        self.consumers: list[Consumer] = []
        self.writers: list[Writer] = []
        self.publishers: list[Publisher] = []
        self.program: Program | None = None
        self._options = {**OPTIONS, **options}
        self._pause_seconds = pause_seconds
        self._stop = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._publishing: list[asyncio.Task[None]] = []
        self.hooks = Hooks(directory)

    # The program

    async def start_server(self) -> None:
        """Start the program on the stage's port; return when it serves."""
        self.program = self.another_server(self.port)
        await asyncio.to_thread(self.program.url)
        await self.until_ready()

    def another_server(self, port: int) -> Program:
        """Start the program on the stage's database; the caller waits for it and ends it."""
        dsn = make_dsn(
            host="127.0.0.1",
            port=self.proxy.port,
            user="postgres",
            dbname=self.database.name,
            sslmode="disable",
            gssencmode="disable",
        )
        options = [f"--{name}={text}" for name, text in self._options.items()]
        return Program(
            "serve",
            f"--port={port}",
            *options,
            env={
                "SSE_LABELS_DSN": dsn,
                "SSE_LABELS_PUBLISH_TOKEN": TOKEN,
                "PYTHONPATH": os.pathsep.join([str(self.hooks.folder), str(REPOSITORY)]),
            },
        )

    async def stop_server(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the program; return its exit status."""
        assert self.program is not None
        if self.program.process.poll() is None:
            self.program.send(number)
        return await asyncio.to_thread(self.program.wait)

    @property
    def pid(self) -> int:
        """The pid of the program."""
        assert self.program is not None
        return self.program.process.pid

    def memory_mib(self, field: str) -> float:
        """The program's memory by /proc: VmRSS, now, or VmHWM, the most so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    def descriptors(self) -> list[int]:
        """The program's open files."""
        return [int(entry.name) for entry in Path(f"/proc/{self.pid}/fd").iterdir()]

    async def ready(self) -> int:
        """The status of /health/ready; 0 without an answer."""
        try:
            return (await get(self.port, "/health/ready"))[0]
        except (OSError, TimeoutError):
            return 0

    async def until_ready(self, wanted: int = 200) -> None:
        """Wait for a status of /health/ready."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.ready() != wanted:
                assert not self._ended(), f"the program ended\n{self.log()}"
                await asyncio.sleep(0.02)

    # The oracle

    async def begin(self, *, slow: bool = True) -> None:
        """Start all consumers, writers and publishers."""
        shared: dict[str, str] = {}

        def consumer(name: str, **how: Any) -> Consumer:
            return Consumer(name, self.seed, self.front_port, shared=shared, **how)

        self.consumers = [
            consumer("all"),
            consumer("live", live=True),
            consumer("restless", restless=True),
            consumer("restless-live", restless=True, live=True),
            consumer("of-sources", wanted=Wanted(sources=tuple(SOURCES[:2]))),
            consumer("of-values", wanted=Wanted(values=(VALUES[0], VALUES[3])), restless=True),
            consumer("of-uris", wanted=Wanted(patterns=("at://did:plc:www*", "at://did:plc:xx*"))),
            SocketConsumer("socket", self.seed, self.front_port, shared=shared),
            SocketConsumer(
                "restless-socket", self.seed, self.front_port, restless=True, shared=shared
            ),
            consumer("of-nothing", wanted=Wanted(sources=("did:plc:" + "q" * 24,))),
        ]
        if slow:
            self.consumers += [consumer("slow", slow=True)]
        pause = self._pause_seconds
        self.writers = [
            Writer(f"writer{n}", self.seed, self.database.dsn, self._stop, pause) for n in range(3)
        ]
        self.publishers = [
            Publisher(f"publisher{n}", self.seed, self.port, TOKEN, self._stop, 2 * pause)
            for n in range(2)
        ]
        self._tasks = [asyncio.create_task(each.run(), name=each.name) for each in self.consumers]
        self._publishing = [asyncio.create_task(each.run()) for each in self.publishers]
        for writer in self.writers:
            writer.start()
        await until(
            lambda: all(c.start is not None and c.position for c in self.consumers if not c.slow),
            PATIENCE_SECONDS,
        )

    async def inject(self, fault: str, strike: Callable[[], Awaitable[Any]]) -> Injection:
        """Make a fault happen; wait until all consumers go on, and note it for the report."""
        first = await self._newest()
        await strike()
        struck = time.monotonic()
        probe = await asyncio.to_thread(self._probe)
        prompt = [c for c in self.consumers if not c.slow and c.wanted == Wanted()]
        try:
            await until(
                lambda: self._ended() or all(c.position >= probe for c in prompt), PATIENCE_SECONDS
            )
            if self._ended():
                raise AssertionError(
                    f"{fault}: the program ended\nSSE_LABELS_TEST_SEED={self.seed}\n{self.log()}"
                )
        except TimeoutError:
            where = {c.name: c.position for c in prompt}
            raise AssertionError(
                f"{fault}: seq {probe} did not arrive within {PATIENCE_SECONDS:g} s: {where}\n"
                f"SSE_LABELS_TEST_SEED={self.seed}\n{self.log()}"
            ) from None
        seconds = time.monotonic() - struck
        last = await self._newest()
        [(labels,)] = await asyncio.to_thread(
            self.database.execute,
            "SELECT count(*) FROM label WHERE id > %s AND id <= %s",
            (first, last),
        )
        injection = Injection(fault, first, last, labels, seconds)
        self.injections.append(injection)
        return injection

    async def end(self) -> Verdict:
        """Stop the writers, read every stream to the newest seq, and compare all of it."""
        self._stop.set()
        await asyncio.gather(*self._publishing)
        for writer in self.writers:
            await asyncio.to_thread(writer.join, PATIENCE_SECONDS)
            assert not writer.is_alive(), writer.name
            await asyncio.to_thread(writer.finish)
        newest = await self._newest()
        complaints = []
        for consumer in self.consumers:
            consumer.hurry = True
        try:
            await until(lambda: all(c.position >= newest for c in self.consumers), 60)
        except TimeoutError:
            complaints = [
                f"{c.name} stands at {c.position}, the newest is {newest}"
                for c in self.consumers
                if c.position < newest
            ]
        await self._end_consumers()
        rows = await asyncio.to_thread(
            self.database.execute,
            "SELECT id, src, uri, cid, val, neg, cts, exp, sig FROM label ORDER BY id",
        )
        truth = {row[0]: expected_event(*row) for row in rows}
        for actor in (*self.consumers, *self.publishers):
            complaints += actor.complaints
        requests = [request for each in self.publishers for request in each.requests]
        complaints += judge_published(requests, truth)
        return Verdict(
            self.seed,
            [
                judge(c.name, c.transcript, truth, start=c.start or 0, passes=c.wanted.passes)
                for c in self.consumers
            ],
            complaints,
            len(truth),
            sum(len(c.transcript) for c in self.consumers),
            self.injections,
        )

    def _ended(self) -> bool:
        return self.program is not None and self.program.process.poll() is not None

    def log(self) -> str:
        """The end of the program's log."""
        return "" if self.program is None else self.program.errors[-6000:]

    def steady(self) -> dict[str, tuple[int, int]]:
        """Streams opened and heartbeats received so far, of consumers that never leave."""
        return {
            c.name: (c.streams, c.heartbeats)
            for c in self.consumers
            if not c.slow and not c.restless
        }

    async def close(self) -> None:
        """End all parts that still run; harmless after `end`."""
        self._stop.set()
        for task in self._publishing:
            task.cancel()
        await asyncio.gather(*self._publishing, return_exceptions=True)
        await self._end_consumers()
        for writer in self.writers:
            if writer.is_alive():
                await asyncio.to_thread(writer.join, PATIENCE_SECONDS)
        if self.program is not None:
            if self.program.process.poll() is None:
                self.program.process.kill()
            await asyncio.to_thread(self.program.wait)

    async def _end_consumers(self) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _newest(self) -> int:
        [(newest,)] = await asyncio.to_thread(
            self.database.execute, "SELECT coalesce(max(id), 0) FROM label"
        )
        return int(newest)

    def _probe(self) -> int:
        while True:
            try:
                return insert_with(self.database.execute)
            except psycopg2.OperationalError:
                time.sleep(0.02)


@asynccontextmanager
async def staged(
    postgres: EmbeddedPostgres,
    seed: str,
    *,
    options: dict[str, str] | None = None,
    statement_timeout: str = "0",
    pause_seconds: float = 0.02,
) -> AsyncIterator[Stage]:
    """A stage on a database of its own; its program serves."""
    where = parse_dsn(postgres.dsn)
    with (
        new_database(postgres, statement_timeout) as database,
        reachable_directory() as directory,
    ):
        async with Proxy(lambda: unix_socket_of(where["host"], where["port"])) as proxy:
            stage = Stage(postgres, database, proxy, directory, seed, options or {}, pause_seconds)
            try:
                await stage.start_server()
                yield stage
            finally:
                await stage.close()
