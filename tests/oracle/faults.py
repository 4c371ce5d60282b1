"""The faults: each function makes one fault happen to a stage.

A function returns when the cause of the fault has gone and the fault has certainly had its effect.
It asserts what must hold while the fault lasts.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import resource
import signal
import time
from email.utils import parsedate_to_datetime

import psycopg2

from oracle.consumers import SOURCES
from oracle.hooks import TRAP_REASON
from oracle.stage import (
    HEARTBEAT_SECONDS,
    PATIENCE_SECONDS,
    QUERY_TIMEOUT_SECONDS,
    TOKEN,
    Stage,
)
from oracle.wire import Flood, get, post_labels

from support.database import until

#: How many more descriptors the program may open when they run out.
DESCRIPTORS_LEFT = 40

_numbers = itertools.count()


async def server_killed(stage: Stage) -> None:
    """The program gets SIGKILL and is started again."""
    await stage.stop_server(signal.SIGKILL)
    await stage.start_server()


async def worker_killed(stage: Stage, place: int) -> None:
    """One of several workers gets SIGKILL; the supervisor starts another one."""
    assert stage.program is not None
    program, served = stage.program, f" worker-{place} sse_labels.app: serving: "
    before = program.errors.count(served)
    started = re.findall(rf"a worker starts: worker={place} pid=(\d+)", program.errors)
    os.kill(int(started[-1]), signal.SIGKILL)
    await asyncio.to_thread(
        program.wait_until, lambda: program.errors.count(served) > before, served
    )


async def postgres_crashes(stage: Stage) -> None:
    """PostgreSQL stops at once as in a crash, is away for a moment, and recovers."""
    pid = int((stage.postgres.data_dir / "postgres/postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGQUIT)
    await stage.until_ready(503)
    await asyncio.to_thread(stage.postgres.start)


async def listener_terminated(stage: Stage) -> None:
    """The backend of the listener is terminated."""
    await terminate_backends(stage, "query ~ 'LISTEN label_channel|SELECT 1;'")


async def backends_terminated(stage: Stage) -> None:
    """Every backend of the database is terminated, the writers' too."""
    await terminate_backends(stage, "true")


async def statement_timeout_fires(stage: Stage) -> None:
    """The table is locked for longer than `statement_timeout`."""

    def lock() -> None:
        connection = psycopg2.connect(stage.database.dsn)
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
    assert stage.program is not None
    await asyncio.to_thread(stage.program.wait_for, "the server cancelled the query")


async def unreachable(stage: Stage, how: str, seconds: float) -> None:
    """The database cannot be reached: connections are `refused` or `swallowed`."""
    before = stage.steady()
    loop = asyncio.get_running_loop()
    back = loop.time() + seconds
    stage.proxy.refuse() if how == "refused" else stage.proxy.swallow()
    try:
        await stage.until_ready(503)
        # Requests that had begun have their time-out; only after it the count of labels is stable.
        uri = f"at://{SOURCES[0]}/app.bsky.feed.post/{how}{next(_numbers)}"
        label = {"src": SOURCES[0], "uri": uri, "val": "spam", "cts": "2026-01-01T00:00:00Z"}
        status, answer = await post_labels(stage.port, TOKEN, [label])
        assert status == 503, answer
        assert answer["error"] == "NotReady"
        while loop.time() < back:
            assert await stage.ready() == 503
            assert (await get(stage.port, "/health/live"))[0] == 200
            await asyncio.sleep(0.1)
        after = stage.steady()
    finally:
        await stage.proxy.accept()
    beats = int((seconds - 2 * QUERY_TIMEOUT_SECONDS) / HEARTBEAT_SECONDS / 2)
    for name, (streams, heartbeats) in before.items():
        assert after[name][0] == streams, f"{name}: its stream did not stay open"
        assert after[name][1] >= heartbeats + beats, f"{name}: {before[name]} {after[name]}"
    await stage.until_ready()
    stored = await asyncio.to_thread(
        stage.database.execute, "SELECT id FROM label WHERE uri = %s", (uri,)
    )
    assert stored == [], "a label that was answered 503 is stored"


async def answer_lost(stage: Stage, *, before: bool) -> None:
    """The connection of a publish is cut before the statement, or before its answer."""
    cuts = stage.proxy.cuts
    stage.proxy.cut_next(b"label_publish", before=before)
    await until(lambda: stage.proxy.cuts > cuts, PATIENCE_SECONDS)


async def clock_set_back(stage: Stage) -> None:
    """The program's clock goes back by an hour, and stays there."""
    hours = stage.hooks.set_clock_back()
    _, headers, _ = await get(stage.port, "/health/live")
    shown = parsedate_to_datetime(headers["date"]).timestamp()
    back = time.time() - shown
    assert abs(back - 3600 * hours) < 60, headers


async def sequencer_raises(stage: Stage) -> None:
    """The sequencer raises an unexpected error; the program ends and is started again."""
    before = ends_received(stage, "ServerStopping")
    stage.hooks.set_trap()
    assert stage.program is not None
    assert await asyncio.to_thread(stage.program.wait) == 1
    assert any("which ends it" in line and TRAP_REASON in line for line in stage.program.err)

    def all_received() -> bool:
        after = ends_received(stage, "ServerStopping")
        return all(number > before[name] for name, number in after.items())

    await until(all_received)
    await stage.start_server()


async def descriptors_run_out(stage: Stage) -> None:
    """Clients use all descriptors, and the database connections are lost at the same time."""
    assert stage.program is not None
    before, logged = stage.steady(), len(stage.program.err)
    soft, hard = resource.prlimit(stage.pid, resource.RLIMIT_NOFILE)
    left = max(stage.descriptors()) + 1 + DESCRIPTORS_LEFT
    for consumer in stage.consumers:
        # A consumer that reconnects during this may be refused.
        consumer.allowed.add("TooManyConnections")
    async with Flood(stage.port) as flood:
        resource.prlimit(stage.pid, resource.RLIMIT_NOFILE, (left, hard))
        try:
            await flood.open_until_refused()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not failed_to_reconnect(stage, logged):
                    await terminate_backends(stage, "application_name = 'sse-labels'", needed=False)
                    await flood.open_until_refused()
            # No descriptor is free for a while; open streams need none.
            await asyncio.sleep(2.5 * HEARTBEAT_SECONDS)
            await flood.open_until_refused()
            for name, (streams, heartbeats) in stage.steady().items():
                assert streams == before[name][0], f"{name}: its stream did not stay open"
                assert heartbeats > before[name][1], f"{name}: no heartbeat"
            await flood.close()
            # The program recovers by itself, with the same limit.
            await stage.until_ready()
        finally:
            resource.prlimit(stage.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert flood.refused, "none was refused"
    assert not flood.complaints, flood.complaints


def failed_to_reconnect(stage: Stage, logged: int) -> bool:
    """Whether sequencer and listener failed to connect, after `logged` lines of the log."""
    assert stage.program is not None
    failed = [line for line in stage.program.err[logged:] if "cannot connect" in line]
    return all(any(who in line for line in failed) for who in (".sequencer", ".listener"))


def ends_received(stage: Stage, end: str) -> dict[str, int]:
    """How often each consumer that never leaves received the error event `end`."""
    staying = [c for c in stage.consumers if not c.slow and not c.restless]
    return {c.name: c.ends[end] for c in staying if c.gets_server_stopping}


async def terminate_backends(stage: Stage, condition: str, *, needed: bool = True) -> None:
    rows = await asyncio.to_thread(
        stage.database.execute,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE"
        " datname = current_database() AND backend_type = 'client backend'"
        f" AND pid <> pg_backend_pid() AND {condition}",
    )
    assert rows or not needed, f"no backend with {condition}"
