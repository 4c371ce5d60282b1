"""Clients that vanish, counted from within: no task, no queue, no descriptor is left over."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import select
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
from oracle import tell

from sse_labels.feed.chunk_queue import ChunkQueue
from sse_labels.feed.outbox import Outbox
from sse_labels.web.door.connection import ClientConnection

from support.database import TestDatabase, until
from support.reading import reading
from support.server import Gate, RunServer, Server, insert_large

#: Of each kind; half of them leave with a reset, the others in order.
CLIENTS = 30
#: Labels of 8 KiB: more than the buffers between the server and a client hold.
HISTORY = 60
#: What one client keeps alive in the server.
KEPT = (Outbox, ChunkQueue, ClientConnection)

UPGRADE = (
    "GET /xrpc/com.atproto.label.subscribeLabels HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
#: socket(7), asm-generic/socket.h.
SO_ATTACH_FILTER = 26
#: How soon the kernel notices at most: two of its whole seconds, its retransmissions, and two
#: noisy cores. Without an end of its own a connection is there for hours.
NOTICED_SECONDS = 30.0


class Program(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


#: One instruction, BPF_RET with 0: of each packet, keep nothing.
RETURN_NOTHING = (ctypes.c_uint64 * 1)(0x06)
DROP_ALL = Program(1, ctypes.addressof(RETURN_NOTHING))


class Crowd:
    """Clients at every place on a stream's way, all of them at once."""

    def __init__(self, server: Server, database: TestDatabase, count: int) -> None:
        self._app = server.app
        self._port = int(server.url.rpartition(":")[2])
        self._database = database
        self._count = count
        self._socks: list[socket.socket] = []

    async def vanish(self) -> dict[str, int]:
        """Come, get stuck, and leave; return how many stood where."""
        store, count = self._app.feed.store, self._count
        pages, gate = store.page, Gate()
        try:
            # Nothing asked, half a head, all of it and gone before the first byte of an answer:
            # these the server may not even have seen when they leave.
            await self._come("")
            await self._come("GET /stream?cursor=0 HT")
            # Stuck in a write in the midst of history: their kernel takes no more.
            await self._come(ask("?cursor=0"))
            await until(lambda: self._streams() == count)
            # Waiting for a page of the database, which does not come; each for one of its own.
            store.page = gate.before(pages)  # type: ignore[method-assign]
            for number in range(count):
                await self._come(ask(f"?cursor=0&values=other{number}"), 1)
            await gate.reached.wait()
            await until(lambda: self._streams() == 2 * count)
            # Live: at rest, and with a queue that fills up while they are stuck.
            await self._come(ask(""))
            await until(lambda: self._caught_up() == count)
            await asyncio.to_thread(insert_large, self._database, HISTORY)
            await until(lambda: self._queued() >= count)
            await self._come(ask("?values=none"))
            await until(lambda: self._caught_up() == 2 * count)
            found = dict(self.census())
            await self._come(ask(""))
        finally:
            for number, sock in enumerate(self._socks):
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            gate.opened.set()
            store.page = pages  # type: ignore[method-assign]
        return found

    def left(self, before: Counter[str]) -> dict[str, int]:
        """What there is more of than there was."""
        now = self.census()
        return {name: max(0, now[name] - before[name]) for name in before}

    def census(self) -> Counter[str]:
        gc.collect()
        found = Counter({kind.__name__: 0 for kind in KEPT})
        found.update(type(one).__name__ for one in gc.get_objects() if type(one) in KEPT)
        found["streams"] = self._streams()
        found["tasks"] = len(asyncio.all_tasks())
        # The pool keeps its connections to the database.
        opened = sum(1 for _ in Path("/proc/self/fd").iterdir())
        found["descriptors"] = opened - len(self._app.database._idle)
        return found

    def _streams(self) -> int:
        return len(self._app.site.streams.open)

    def _caught_up(self) -> int:
        return sum(visit.outbox.caught_up for visit in self._app.site.streams.open.values())

    def _queued(self) -> int:
        return sum(visit.outbox.queued > 0 for visit in self._app.site.streams.open.values())

    async def _come(self, text: str, count: int | None = None) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self._count if count is None else count):
            sock = socket.socket()
            self._socks.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, ("127.0.0.1", self._port))
            await loop.sock_sendall(sock, text.encode())


class NetworkGone(Crowd):
    """Clients that open connections of each kind, and then answer no packet any more."""

    async def come(self) -> None:
        """Open quiet streams, WebSockets, and connections that are idle between requests."""
        await self._come(ask("?values=none"))
        await self._come(ask(""))
        await self._come(UPGRADE)
        await until(lambda: self._caught_up() >= 3 * self._count)
        await self._come("GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n")
        await until(lambda: all(select.select([sock], [], [], 0)[0] for sock in self._socks))

    def vanish_without_a_word(self) -> None:
        """Let their kernel drop what comes, as a network that is gone does: no FIN, no reset."""
        for sock in self._socks:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(DROP_ALL))

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


def ask(query: str) -> str:
    """The head of a request for a stream."""
    return f"GET /stream{query} HTTP/1.1\r\nHost: test\r\n\r\n"


async def test_clients_that_vanish_leave_no_task_no_queue_no_descriptor(
    run_server: RunServer, database: TestDatabase, request: pytest.FixtureRequest
) -> None:
    insert_large(database, HISTORY)
    # No heartbeat finds out what the end of a connection did not.
    async with run_server(
        page_max_events=10, page_cache_max_bytes=0, heartbeat_seconds=60
    ) as server:
        # What is made once, by whoever comes first, is no leftover.
        rehearsal = Crowd(server, database, 1)
        await rehearsal.vanish()
        await until(lambda: rehearsal.census()["streams"] == 0)
        await until(lambda: rehearsal.census()["ClientConnection"] == 0)
        crowd = Crowd(server, database, CLIENTS)
        before = crowd.census()
        present = await crowd.vanish()
        assert present["Outbox"] == present["streams"] == 4 * CLIENTS
        # Only those that lag have a queue.
        assert present["ChunkQueue"] == CLIENTS
        assert present["ClientConnection"] >= 4 * CLIENTS
        try:
            await until(lambda: not any(crowd.left(before).values()))
        finally:
            left = crowd.left(before)
            tell(request.config, f"{7 * CLIENTS} clients that vanished; at most {present}")
            tell(request.config, f"left over: {left}")
        assert not server.app.feed.sequencer.subscribers


async def test_clients_whose_network_is_gone_are_gone_within_heartbeat_and_send_timeout(
    run_server: RunServer, database: TestDatabase, request: pytest.FixtureRequest
) -> None:
    # Nothing else ends an idle connection in time.
    times = {"keepalive_seconds": 600, "heartbeat_seconds": 0.2}
    async with (
        run_server(**times, send_timeout_seconds=0.5, slow_grace_seconds=0.5) as server,
        reading(server.stream_url) as reader,
    ):
        await reader.until_opened()
        crowd = NetworkGone(server, database, CLIENTS)
        try:
            before = crowd.census()
            await crowd.come()
            present = crowd.census()
            assert present["ClientConnection"] - before["ClientConnection"] == 4 * CLIENTS
            assert present["streams"] - before["streams"] == 3 * CLIENTS
            crowd.vanish_without_a_word()
            began = time.monotonic()
            [seq] = database.insert(1)
            await until(lambda: not crowd.left(before)["ClientConnection"])
            seconds = time.monotonic() - began
        finally:
            crowd.close()
        tell(request.config, f"{4 * CLIENTS} clients without a network: gone in {seconds:.1f} s")
        assert seconds < NOTICED_SECONDS
        await until(lambda: not any(crowd.left(before).values()))
        # Whoever answers was let alone.
        await reader.until_seq(seq)
        assert len(server.app.site.streams.open) == 1
