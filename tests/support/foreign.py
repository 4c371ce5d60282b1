"""Client libraries by other authors read a server while faults happen to it.

Each client is a few lines in `tests/soak/clients` around a library. It writes one line of JSON for
each message that the library delivers. All clients read at the same time, either directly or
through nginx, while labels are stored and faults happen to the server. At the end the lines of each
client are compared with the table.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from support.database import TestDatabase, until
from support.foreign_libraries import Library
from support.nginx import Nginx, nginx
from support.program import Program, free_port

WAYS = ("direct", "through nginx")
#: Time between two labels.
PUBLISH_SECONDS = 0.05
#: The faults in which the server is full, and the limit that is reached.
FULL = {"full of streams": "max-streams", "full of connections": "max-connections"}


class Reader:
    """One running client, and the seqs that it received."""

    def __init__(self, library: Library, url: str) -> None:
        self.name = library.name
        self.seqs: list[int] = []
        #: The number of messages without data that the library delivered.
        self.empty = 0
        self.told: Counter[str] = Counter()
        self.complaints: list[str] = []
        socket = url.replace("http://", "ws://")
        self._process = subprocess.Popen(
            library.command,
            env={
                **os.environ,
                **library.environment,
                "URL": socket if library.command[-1].endswith("subscribe.mjs") else
                f"{url}/stream?cursor=0",
                "SOCKET": socket,
                "CURSOR": "0",
                "NO_PROXY": "*",
                "PYTHONWARNINGS": "ignore",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self._threads = [
            threading.Thread(target=self._listen, daemon=True),
            threading.Thread(target=self._note, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def last(self) -> int:
        return max(self.seqs, default=0)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                self.complaints.append(line)
                continue
            if "seq" in said:
                self.seqs.append(said["seq"])
            elif "empty" in said:
                self.empty += 1
            else:
                self.told[str(said.get("error") or said.get("name"))] += 1

    def _note(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.complaints.append(line)
            del self.complaints[:-40]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


@dataclass(frozen=True)
class Row:
    """The result of one client, for one way and one fault."""

    client: str
    way: str
    fault: str
    stored: int
    received: int
    lost: int
    doubled: int
    #: Labels after the last one that it received.
    stuck: int
    empty: int
    complaint: str = ""

    @property
    def whole(self) -> bool:
        """Whether it received each row once, and no other message."""
        return self.received == self.stored and not (
            self.lost or self.doubled or self.stuck or self.empty
        )


def judge(reader: Reader, way: str, fault: str, stored: Sequence[int]) -> Row:
    """Compare the seqs of one client with the table."""
    received = set(reader.seqs)
    return Row(
        client=reader.name,
        way=way,
        fault=fault,
        stored=len(stored),
        received=len(received & set(stored)),
        lost=sum(seq <= reader.last and seq not in received for seq in stored),
        doubled=len(reader.seqs) - len(received),
        stuck=sum(seq > reader.last for seq in stored),
        empty=reader.empty,
        complaint="".join(reader.complaints[-4:]).strip(),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a line each."""
    width = max(len(row.fault) for row in rows)
    head = (
        f"{'client':<36} {'way':<14} {'fault':<{width}} stored received  lost doubled stuck empty"
    )
    lines = [
        f"{row.client:<36} {row.way:<14} {row.fault:<{width}} {row.stored:6} {row.received:8}"
        f" {row.lost:5} {row.doubled:7} {row.stuck:5} {row.empty:5}"
        for row in rows
    ]
    return "\n".join([head, *lines])


class Struck:
    """One server to which faults happen, with its proxy, its database and its clients."""

    def __init__(
        self,
        database: TestDatabase,
        way: str,
        settings: Sequence[str],
        away: Callable[[Struck], Awaitable[Any]],
        patience_seconds: float,
    ) -> None:
        self.database = database
        self.way = way
        self.readers: list[Reader] = []
        self.proxy: Nginx | None = None
        self.port = free_port()
        #: The next fault.
        self.fault = ""
        self._settings = ("serve", f"--port={self.port}", "--dsn", database.dsn, *settings)
        self._program: Program | None = None
        #: Called to wait while the server is away or full.
        self._away = away
        self._patience_seconds = patience_seconds
        self._holders: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        """The address that the clients read."""
        return self.proxy.url if self.proxy else f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._program = Program(*self._settings)
        await asyncio.to_thread(self._program.url)

    async def stop(self, number: signal.Signals) -> None:
        if self._program is not None and self._program.process.poll() is None:
            await asyncio.to_thread(self._program.end, number)

    async def fill(self, places: int) -> None:
        """Open streams until the server is full."""
        for _ in range(places):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"GET /stream HTTP/1.1\r\nHost: full\r\n\r\n")
            await reader.readline()
            self._holders.append(writer)

    async def leave(self) -> None:
        """Close these streams."""
        for writer in self._holders:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        self._holders.clear()

    async def strike(self, number: signal.Signals) -> None:
        """End the server and start it again."""
        await self.stop(number)
        await self._away(self)
        await self.start()

    async def strike_full(self, places: int) -> None:
        """End the server, start it again, and keep it full for a while."""
        # Clients are suspended: a client that reconnects at once would get a stream.
        for reader in self.readers:
            reader.send(signal.SIGSTOP)
        await self.stop(signal.SIGTERM)
        await self.start()
        await self.fill(places)
        for reader in self.readers:
            reader.send(signal.SIGCONT)
        await self._away(self)
        await self.leave()

    async def all_have_come(self) -> None:
        """Wait until every running client has all labels that are stored now, or time is up."""
        [(head,)] = self.database.execute("SELECT coalesce(max(id), 0) FROM label")
        with suppress(TimeoutError):
            await until(
                lambda: all(not each.runs or each.last >= head for each in self.readers),
                self._patience_seconds,
            )


@asynccontextmanager
async def publishing(database: TestDatabase) -> AsyncIterator[None]:
    """Store a label every PUBLISH_SECONDS during the block."""

    async def publish() -> None:
        while True:
            await asyncio.to_thread(database.insert)
            await asyncio.sleep(PUBLISH_SECONDS)

    task = asyncio.create_task(publish())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@contextmanager
def way_of(server: Struck, faults: dict[str, str]) -> Any:
    """Start nginx before the server, when clients read through nginx."""
    if server.way == "direct":
        yield
    else:
        with nginx(server.port, faults=faults) as proxy:
            server.proxy = proxy
            yield


async def struck(
    libraries: Sequence[Library],
    database: TestDatabase,
    way: str,
    faults: Sequence[str],
    *,
    settings: Sequence[str],
    site: dict[str, str],
    away: Callable[[Struck], Awaitable[Any]],
    patience_seconds: float,
) -> list[Row]:
    """Let all libraries read while the faults happen; return the result of each."""
    # One connection for each client, and some for nginx and this test.
    places = len(libraries) + 8
    limits = {name: FULL[name] for name in faults if name in FULL}
    settings = [*settings, *(f"--{limit}={places}" for limit in limits.values())]
    server = Struck(database, way, settings, away, patience_seconds)
    async with AsyncExitStack() as stack:
        await server.start()
        stack.push_async_callback(lambda: server.stop(signal.SIGKILL))
        stack.enter_context(way_of(server, site))
        if limits:
            # The server is full also when the clients connect for the first time.
            await server.fill(places)
        for library in libraries:
            reader = await asyncio.to_thread(Reader, library, server.url)
            stack.callback(reader.end)
            server.readers.append(reader)
        database.insert()
        async with publishing(database):
            if limits:
                server.fault = next(iter(limits))
                await away(server)
                await server.leave()
            for server.fault in faults:
                await server.all_have_come()
                if server.fault in FULL:
                    await server.strike_full(places)
                else:
                    await server.strike(signal.Signals[server.fault])
            await server.all_have_come()
        await server.all_have_come()
        stored = [event["seq"] for event in database.stored()]
        fault = ", ".join(dict.fromkeys(faults))
        return [judge(reader, way, fault, stored) for reader in server.readers]
