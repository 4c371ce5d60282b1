"""A client that does not read harms nobody: it is cut in bounded time, and costs bounded memory."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from oracle import choose_seed, tell
from oracle.actors import Consumer
from oracle.stage import Stage, own_postgres, staged
from oracle.verdict import judge
from oracle.wire import get, metric, until_so

from sse_labels.embedded import EmbeddedPostgres

from support.database import until

#: What a soak raises (`make soak`); the numbers of an ordinary run stand beside.
MANY = os.environ.get("SSE_LABELS_SOAK_SECONDS") is not None
EVENTS = 1_000_000 if MANY else 100_000
VANISHING = 5_000 if MANY else 1_000
FROZEN = 50

SEND_TIMEOUT_SECONDS = 3.0
SLOW_GRACE_SECONDS = 1.0
#: A frozen reader holds 64 KiB of the server's send buffer and its own receive buffer, then one
#: write waits: at most this long after the first event it is cut. The rest is two noisy cores.
CUT_SECONDS = SEND_TIMEOUT_SECONDS + 3.0
#: Ring and page cache (below), 50 queues that share their chunks, and what malloc keeps.
GROWTH_MAX_MIB = 64.0
OPTIONS = {
    "outbox-max-events": "5000",
    "slow-grace-seconds": str(SLOW_GRACE_SECONDS),
    "send-timeout-seconds": str(SEND_TIMEOUT_SECONDS),
    "ring-max-bytes": "8MiB",
    "page-cache-max-bytes": "4MiB",
    "page-max-events": "500",
    "query-timeout-seconds": "10",
}
REQUEST = b"GET /stream?cursor=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with own_postgres() as server:
        yield server


@asynccontextmanager
async def reading(stage: Stage) -> AsyncIterator[Consumer]:
    """An ordinary consumer that reads everything meanwhile."""
    consumer = Consumer("ordinary", stage.seed, stage.port, shared={})
    task = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def assert_got_everything(stage: Stage, consumer: Consumer) -> None:
    truth = {event["seq"]: event for event in stage.database.stored()}
    findings = judge(consumer.name, consumer.transcript, truth)
    assert not findings, findings
    assert not consumer.complaints
    assert consumer.streams == 1, "the ordinary consumer was cut too"


def memory_mib(stage: Stage, field: str) -> float:
    assert stage.program is not None
    status = Path(f"/proc/{stage.program.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def open_files(stage: Stage) -> int:
    assert stage.program is not None
    return len(list(Path(f"/proc/{stage.program.process.pid}/fd").iterdir()))


async def connect(stage: Stage) -> socket.socket:
    """A client that has asked for everything, and reads nothing so far."""
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", stage.port))
        await loop.sock_sendall(sock, REQUEST)
    except BaseException:
        sock.close()
        raise
    return sock


async def test_frozen_readers_are_cut_in_time_and_everybody_else_gets_everything(
    postgres: EmbeddedPostgres, request: pytest.FixtureRequest
) -> None:
    async with staged(postgres, choose_seed(), options=OPTIONS) as stage, reading(stage) as reader:
        frozen: list[socket.socket] = []
        try:
            for _ in range(FROZEN):
                frozen.append(await connect(stage))  # noqa: PERF401 - closed when one fails
            await until(lambda: reader.streams == 1)

            async def all_open() -> bool:
                return await metric(stage.port, "sse_labels_streams") == FROZEN + 1

            await until_so(all_open)
            before = memory_mib(stage, "VmRSS")
            began = time.monotonic()
            filling = asyncio.create_task(fill(stage))
            cut = await closed_by_server(frozen, began + CUT_SECONDS)
            cut_after = time.monotonic() - began
            assert len(cut) == FROZEN, f"{FROZEN - len(cut)} are not cut after {CUT_SECONDS} s"
            assert await metric(stage.port, "sse_labels_streams") == 1
            last = await filling
            await until(lambda: reader.position >= last, 60 + EVENTS / 5_000)
            peak = memory_mib(stage, "VmHWM")
        finally:
            for sock in frozen:
                sock.close()
        assert_got_everything(stage, reader)
        assert len(reader.transcript) == EVENTS
        measured = f"cut after {cut_after:.1f} s, {before:.1f} MiB grew to {peak:.1f} MiB"
        tell(request.config, f"{FROZEN} frozen readers, {EVENTS} events: {measured}")
        assert peak - before < GROWTH_MAX_MIB, measured


async def fill(stage: Stage) -> int:
    """Publish all events, in transactions of 1,000 as fast as they come; return the last seq."""
    for _ in range(EVENTS // 1_000):
        await asyncio.to_thread(stage.database.fill, 1_000)
        # The ordinary reader shares this event loop and these cores; it must keep up here.
        await asyncio.sleep(0.02)
    [(last,)] = await asyncio.to_thread(stage.database.execute, "SELECT max(id) FROM label")
    return int(last)


async def closed_by_server(socks: list[socket.socket], deadline: float) -> set[int]:
    """The sockets that were reset, without a byte being read from them."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, 0)  # Only errors and hang-ups, which cannot be left out.
    cut: set[int] = set()
    while len(cut) < len(socks) and time.monotonic() < deadline:
        for number, _ in poll.poll(0):
            poll.unregister(number)
            cut.add(number)
        await asyncio.sleep(0.02)
    return cut


async def test_client_that_reads_one_byte_a_second_is_cut(postgres: EmbeddedPostgres) -> None:
    async with staged(postgres, choose_seed(), options=OPTIONS) as stage, reading(stage) as reader:
        sock = await connect(stage)
        sipping = asyncio.create_task(sip(sock))
        try:
            await until(lambda: reader.streams == 1)
            began = time.monotonic()
            await asyncio.to_thread(stage.database.fill, 5_000)
            # What its own kernel holds it may still read after the reset, at its pace.
            assert await closed_by_server([sock], began + CUT_SECONDS), "it is not cut"
        finally:
            sipping.cancel()
            await asyncio.gather(sipping, return_exceptions=True)
            sock.close()
        await until(lambda: reader.position >= 5_000)
        assert_got_everything(stage, reader)


async def sip(sock: socket.socket) -> None:
    """Read one byte a second."""
    while await asyncio.get_running_loop().sock_recv(sock, 1):  # noqa: ASYNC110 - its pace
        await asyncio.sleep(1)


async def test_clients_that_vanish_leave_nothing_behind(postgres: EmbeddedPostgres) -> None:
    async with staged(postgres, choose_seed(), options=OPTIONS) as stage:
        await asyncio.to_thread(stage.database.fill, 100)
        await get(stage.port, "/metrics")
        before = open_files(stage)
        for _ in range(0, VANISHING, 100):
            socks = [await connect(stage) for _ in range(100)]
            for number, sock in enumerate(socks):
                if number % 3 == 0:
                    # In the midst of the stream; the others before the first byte, or just so.
                    await asyncio.get_running_loop().sock_recv(sock, 4096)
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

        async def all_gone() -> bool:
            streams = await metric(stage.port, "sse_labels_streams")
            return streams == 0 and open_files(stage) <= before

        await until_so(all_gone, 20)
        assert await stage.ready() == 200
