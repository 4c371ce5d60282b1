"""The stage: PostgreSQL, a proxy, the program, and the oracle; and the faults, one method each.

A fault returns when its cause is gone and it is certain that it struck. What must hold while it
lasts is asserted where it is injected.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import resource
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from oracle.actors import SOURCES, VALUES, Consumer, Publisher, Wanted, Writer
from oracle.proxy import Proxy, unix_socket_of
from oracle.sockets import SocketConsumer
from oracle.verdict import Injection, Verdict, judge, judge_published
from oracle.wire import Flood, get, post_labels
from sse_labels.embedded import EmbeddedPostgres

from support.database import (
    NOT_DURABLE,
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
#: Files that tell the program's process what to do, by `sitecustomize`: to go back by as many
#: hours as one has bytes, and to raise in the sequencer, between reading rows and handing them out.
_HOOKS = """
import os, time
from sse_labels.feed.store import Store

def hours():
    try:
        return os.stat({clock!r}).st_size
    except FileNotFoundError:
        return 0

def encode(*args, with_keys=False, **kwargs):
    # Keys are for live chunks alone: the caller is the sequencer.
    if with_keys:
        try:
            os.unlink({trap!r})
        except FileNotFoundError:
            pass
        else:
            raise RuntimeError({reason!r})
    return chunk(*args, with_keys=with_keys, **kwargs)

real, time.time = time.time, lambda: real() - 3600 * hours()
chunk, Store.chunk = Store.chunk, encode
"""
TRAP_REASON = "the oracle made the sequencer raise"
#: What clients may take when descriptors shall run out.
DESCRIPTORS_LEFT = 40


@contextmanager
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL that may be killed without hurting the other tests."""
    with (
        reachable_directory() as directory,
        EmbeddedPostgres(
            directory,
            settings={
                **NOT_DURABLE,
                "max_prepared_transactions": "50",
                "log_min_messages": "fatal",
            },
        ) as server,
    ):
        yield server


_names = itertools.count()


class Stage:
    """Everything that one run needs; `async with staged(…)` makes it."""

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
        #: Where consumers read: of the program itself, or of a proxy in front of it.
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
        self._clock_flag = directory / "hours-back"
        self._trap = directory / "trap"
        self._hooks = directory / "hooks"
        self._hooks.mkdir()
        (self._hooks / "sitecustomize.py").write_text(
            _HOOKS.format(clock=str(self._clock_flag), trap=str(self._trap), reason=TRAP_REASON)
        )

    # The program

    async def start_server(self) -> None:
        """Start the program on this stage's port; return when it serves."""
        self.program = self.another_server(self.port)
        await asyncio.to_thread(self.program.url)
        await self.until_ready()

    def another_server(self, port: int) -> Program:
        """Start the program on this stage's database; the caller waits for it, and ends it."""
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
                "PYTHONPATH": os.pathsep.join([str(self._hooks), str(REPOSITORY)]),
            },
        )

    async def stop_server(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the program; return its status."""
        assert self.program is not None
        if self.program.process.poll() is None:
            self.program.send(number)
        return await asyncio.to_thread(self.program.wait)

    @property
    def pid(self) -> int:
        """The program's process."""
        assert self.program is not None
        return self.program.process.pid

    def memory_mib(self, field: str) -> float:
        """What /proc says of the program: VmRSS, now, or VmHWM, the most so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    def descriptors(self) -> list[int]:
        """The program's open files."""
        return [int(entry.name) for entry in Path(f"/proc/{self.pid}/fd").iterdir()]

    async def ready(self) -> int:
        """The status of /health/ready; 0 when nobody answers."""
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
        """Let all actors begin."""
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
        """Let a fault happen; wait until all went on, and note it for the report."""
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
        """Stop the writers, read every stream to the newest seq, and compare."""
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
        """Streams opened and heartbeats received so far, of consumers that stay."""
        return {
            c.name: (c.streams, c.heartbeats)
            for c in self.consumers
            if not c.slow and not c.restless
        }

    async def close(self) -> None:
        """End what still runs; harmless after `end`."""
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

    # The faults

    async def server_killed(self) -> None:
        """SIGKILL, and a new start."""
        await self.stop_server(signal.SIGKILL)
        await self.start_server()

    async def worker_killed(self, place: int) -> None:
        """SIGKILL for one of several processes; another takes its place."""
        assert self.program is not None
        program, served = self.program, f" worker-{place} sse_labels.app: serving: "
        before = program.errors.count(served)
        started = re.findall(rf"a worker starts: worker={place} pid=(\d+)", program.errors)
        os.kill(int(started[-1]), signal.SIGKILL)
        await asyncio.to_thread(
            program.wait_until, lambda: program.errors.count(served) > before, served
        )

    async def postgres_crashes(self) -> None:
        """PostgreSQL stops at once, as after a crash, is away for a moment, and recovers."""
        pid = int((self.postgres.data_dir / "postgres/postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
        await self.until_ready(503)
        await asyncio.to_thread(self.postgres.start)

    async def listener_terminated(self) -> None:
        """The backend that listens is terminated."""
        await self._terminate("query ~ 'LISTEN label_channel|SELECT 1;'")

    async def backends_terminated(self) -> None:
        """Every backend of the database is terminated, the writers' too."""
        await self._terminate("true")

    async def statement_timeout_fires(self) -> None:
        """The table is locked for longer than a statement may take there."""

        def lock() -> None:
            connection = psycopg2.connect(self.database.dsn)
            try:
                with connection.cursor() as cursor:
                    # Prepared transactions and delayed commits end first.
                    cursor.execute("SET statement_timeout = '20s'")
                    cursor.execute("LOCK TABLE label IN ACCESS EXCLUSIVE MODE")
                    cursor.execute("SELECT pg_sleep(1.2)")
                connection.rollback()
            finally:
                connection.close()

        await asyncio.to_thread(lock)
        assert self.program is not None
        await asyncio.to_thread(self.program.wait_for, "the server cancelled the query")

    async def unreachable(self, how: str, seconds: float) -> None:
        """The database cannot be reached: `refused`, or `swallowed` by a black hole."""
        before = self.steady()
        loop = asyncio.get_running_loop()
        back = loop.time() + seconds
        self.proxy.refuse() if how == "refused" else self.proxy.swallow()
        try:
            await self.until_ready(503)
            # What was under way has its time-out; only then is the count of labels at rest.
            uri = f"at://{SOURCES[0]}/app.bsky.feed.post/{how}{next(_names)}"
            label = {"src": SOURCES[0], "uri": uri, "val": "spam", "cts": "2026-01-01T00:00:00Z"}
            status, answer = await post_labels(self.port, TOKEN, [label])
            assert status == 503, answer
            assert answer["error"] == "NotReady"
            while loop.time() < back:
                assert await self.ready() == 503
                assert (await get(self.port, "/health/live"))[0] == 200
                await asyncio.sleep(0.1)
            after = self.steady()
        finally:
            await self.proxy.accept()
        beats = int((seconds - 2 * QUERY_TIMEOUT_SECONDS) / HEARTBEAT_SECONDS / 2)
        for name, (streams, heartbeats) in before.items():
            assert after[name][0] == streams, f"{name}: its stream did not stay open"
            assert after[name][1] >= heartbeats + beats, f"{name}: {before[name]} {after[name]}"
        await self.until_ready()
        stored = await asyncio.to_thread(
            self.database.execute, "SELECT id FROM label WHERE uri = %s", (uri,)
        )
        assert stored == [], "what was answered 503 is stored"

    async def answer_lost(self, *, before: bool) -> None:
        """The connection of a publish dies: before PostgreSQL has it, or before its answer."""
        cuts = self.proxy.cuts
        self.proxy.cut_next(b"label_publish", before=before)
        await until(lambda: self.proxy.cuts > cuts, PATIENCE_SECONDS)

    async def clock_set_back(self) -> None:
        """The program's clock goes back by an hour; nobody sets it forward again."""
        with self._clock_flag.open("ab") as flag:
            flag.write(b"h")
        _, headers, _ = await get(self.port, "/health/live")
        told = parsedate_to_datetime(headers["date"]).timestamp()
        back = time.time() - told
        assert abs(back - 3600 * self._clock_flag.stat().st_size) < 60, headers

    async def sequencer_raises(self) -> None:
        """The sequencer's task raises what nobody expects; a supervisor starts the program anew."""
        before = self._told("ServerStopping")
        self._trap.touch()
        assert self.program is not None
        assert await asyncio.to_thread(self.program.wait) == 1
        assert any("which ends it" in line and TRAP_REASON in line for line in self.program.err)
        await until(lambda: all(n > before[c] for c, n in self._told("ServerStopping").items()))
        await self.start_server()

    async def descriptors_run_out(self) -> None:
        """Clients take all descriptors, and the connections to the database are lost meanwhile."""
        assert self.program is not None
        before, told = self.steady(), len(self.program.err)
        soft, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        left = max(self.descriptors()) + 1 + DESCRIPTORS_LEFT
        for consumer in self.consumers:
            # One that comes back meanwhile.
            consumer.allowed.add("TooManyConnections")
        async with Flood(self.port) as flood:
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (left, hard))
            try:
                await flood.rise()
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while not self._reconnected_in_vain(told):
                        await self._terminate("application_name = 'sse-labels'", needed=False)
                        await flood.rise()
                # For a while nothing is to be had; the streams need none of it.
                await asyncio.sleep(2.5 * HEARTBEAT_SECONDS)
                await flood.rise()
                for name, (streams, heartbeats) in self.steady().items():
                    assert streams == before[name][0], f"{name}: its stream did not stay open"
                    assert heartbeats > before[name][1], f"{name}: no heartbeat"
                await flood.ebb()
                # It recovers by itself, with as many as before.
                await self.until_ready()
            finally:
                resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert flood.refused, "none was refused"
        assert not flood.complaints, flood.complaints

    def _reconnected_in_vain(self, told: int) -> bool:
        """Whether sequencer and listener have tried, since their `told`th line of log."""
        assert self.program is not None
        vain = [line for line in self.program.err[told:] if "cannot connect" in line]
        return all(any(who in line for line in vain) for who in (".sequencer", ".listener"))

    def _told(self, end: str) -> dict[str, int]:
        """How often each consumer that stays was told that its stream ends so."""
        staying = [c for c in self.consumers if not c.slow and not c.restless]
        return {c.name: c.ends[end] for c in staying if c.told_of_stopping}

    async def _terminate(self, condition: str, *, needed: bool = True) -> None:
        rows = await asyncio.to_thread(
            self.database.execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE"
            " datname = current_database() AND backend_type = 'client backend'"
            f" AND pid <> pg_backend_pid() AND {condition}",
        )
        assert rows or not needed, f"no backend with {condition}"


@asynccontextmanager
async def staged(
    postgres: EmbeddedPostgres,
    seed: str,
    *,
    options: dict[str, str] | None = None,
    statement_timeout: str = "0",
    pause_seconds: float = 0.02,
) -> AsyncIterator[Stage]:
    """A stage on a database of its own, its program serving."""
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    name = f"stage_{next(_names)}"
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        cursor.execute(f"ALTER DATABASE {name} SET statement_timeout = %s", (statement_timeout,))
    admin.close()
    database = TestDatabase(make_dsn(postgres.dsn, dbname=name), name)
    where = parse_dsn(postgres.dsn)
    with reachable_directory() as directory:
        async with Proxy(lambda: unix_socket_of(where["host"], where["port"])) as proxy:
            stage = Stage(postgres, database, proxy, directory, seed, options or {}, pause_seconds)
            try:
                await stage.start_server()
                yield stage
            finally:
                await stage.close()
                database.close()
                with contextlib.suppress(psycopg2.Error):
                    drop(postgres, name)


def drop(postgres: EmbeddedPostgres, name: str) -> None:
    """Drop a stage's database, its prepared transactions first."""
    inside = psycopg2.connect(make_dsn(postgres.dsn, dbname=name))
    inside.autocommit = True
    with inside.cursor() as cursor:
        cursor.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        for (gid,) in cursor.fetchall():
            cursor.execute("ROLLBACK PREPARED %s", (gid,))
    inside.close()
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()
