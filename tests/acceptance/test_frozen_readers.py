"""Clients that do not read, ask too slowly, or vanish harm nobody: bounded time, bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from oracle import choose_seed, tell
from oracle.consumers import Consumer
from oracle.databases import own_postgres
from oracle.stage import TOKEN, Stage, staged
from oracle.verdict import judge
from oracle.wire import get, metric, until_so

from sse_labels.embedded import EmbeddedPostgres

from support.database import until

#: What a soak raises (`make soak`); the numbers of an ordinary run stand beside.
MANY = os.environ.get("SSE_LABELS_SOAK_SECONDS") is not None
EVENTS = 1_000_000 if MANY else 100_000
VANISHING = 5_000
FROZEN = 50
#: How many heads, and how many bodies, trickle in at the same time.
TRICKLING = 200
REQUEST_SECONDS = 2.0
#: Deadlines are swept in steps, and two cores are noisy.
ANSWERED_SECONDS = REQUEST_SECONDS + 1.5
#: What is left of a body is read for two seconds more, so that no reset overtakes the answer.
ENDED_SECONDS = ANSWERED_SECONDS + 2.0

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
            before = stage.memory_mib("VmRSS")
            began = time.monotonic()
            filling = asyncio.create_task(fill(stage))
            cut = await closed_by_server(frozen, began + CUT_SECONDS)
            cut_after = time.monotonic() - began
            assert len(cut) == FROZEN, f"{FROZEN - len(cut)} are not cut after {CUT_SECONDS} s"
            assert await metric(stage.port, "sse_labels_streams") == 1
            last = await filling
            await until(lambda: reader.position >= last, 60 + EVENTS / 5_000)
            peak = stage.memory_mib("VmHWM")
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


async def test_requests_that_trickle_in_are_ended_in_time_and_everybody_else_is_served(
    postgres: EmbeddedPostgres, request: pytest.FixtureRequest
) -> None:
    options = {**OPTIONS, "request-seconds": str(REQUEST_SECONDS), "max-connections": "1000"}
    head = f"POST /labels HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    whole = f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    async with staged(postgres, choose_seed(), options=options) as stage, reading(stage) as reader:
        await until(lambda: reader.streams == 1)
        before = len(stage.descriptors())
        slow = [
            asyncio.create_task(trickle(stage.port, begin.encode(), b"x"))
            for begin in [head] * TRICKLING + [whole] * TRICKLING
        ]
        try:
            delays = []
            while not all(task.done() for task in slow):
                # Meanwhile a label arrives as quickly as ever.
                began = time.monotonic()
                [seq] = await asyncio.to_thread(stage.database.insert)
                await until(lambda seq=seq: reader.position >= seq)
                delays.append(time.monotonic() - began)
            ended = [await task for task in slow]
        finally:
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
        assert all(b'"RequestTimeout"' in one.answer for one in ended)
        assert all(one.answer.startswith(b"HTTP/1.1 408 ") for one in ended)
        answered = max(one.answered_after for one in ended)
        over = max(one.ended_after for one in ended)
        measured = (
            f"answered after {answered:.1f} s, ended after {over:.1f} s; meanwhile "
            f"{len(delays)} labels arrived within {1000 * max(delays):.0f} ms each"
        )
        tell(request.config, f"{TRICKLING} slow heads, {TRICKLING} slow bodies: {measured}")
        assert min(one.answered_after for one in ended) >= REQUEST_SECONDS, measured
        assert answered < ANSWERED_SECONDS, measured
        assert over < ENDED_SECONDS, measured
        assert len(delays) > 5, measured
        await until(lambda: len(stage.descriptors()) <= before)
        assert_got_everything(stage, reader)


class Trickled(NamedTuple):
    """How one slow request went, in seconds from its first byte."""

    answer: bytes
    answered_after: float
    ended_after: float


async def trickle(port: int, begin: bytes, rest: bytes) -> Trickled:
    """Send `begin`, then `rest` again and again until the connection has ended."""
    # Before the server can see it: its clock runs from accepting, and we may be told late.
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def read() -> Trickled:
        answer = await reader.readuntil(b"}")
        answered = time.monotonic()
        with contextlib.suppress(ConnectionResetError):  # It does send on.
            await reader.read()
        return Trickled(answer, answered - began, time.monotonic() - began)

    reading = asyncio.create_task(read())
    try:
        writer.write(begin)
        while not reading.done():
            writer.write(rest)
            await asyncio.wait({reading}, timeout=0.2)
        return reading.result()
    finally:
        reading.cancel()
        writer.transport.abort()


async def test_clients_that_vanish_leave_nothing_behind(
    postgres: EmbeddedPostgres, request: pytest.FixtureRequest
) -> None:
    async with staged(postgres, choose_seed(), options=OPTIONS) as stage:
        await asyncio.to_thread(stage.database.fill, 100)
        await get(stage.port, "/metrics")
        before = len(stage.descriptors())
        for _ in range(0, VANISHING, 100):
            socks = [await connect(stage) for _ in range(100)]
            for number, sock in enumerate(socks):
                if number % 3 == 0:
                    # In the midst of the stream; the others before the first byte, or just so.
                    await asyncio.get_running_loop().sock_recv(sock, 4096)
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

        left = (0, 0)

        async def all_gone() -> bool:
            nonlocal left
            streams = int(await metric(stage.port, "sse_labels_streams"))
            left = streams, max(0, len(stage.descriptors()) - before)
            return left == (0, 0)

        try:
            await until_so(all_gone, 20)
        finally:
            told = f"left over: {left[0]} streams, {left[1]} descriptors"
            tell(request.config, f"{VANISHING} clients that vanished, {told}")
        assert await stage.ready() == 200
