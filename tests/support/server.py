"""The whole application in the test's process, with short times, and gates to stop calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from sse_labels.app import App
from sse_labels.feed.chunk import Chunk

from support.database import TestDatabase
from support.reading import PATIENCE_SECONDS

PUBLISH_TOKEN = "test-publish-token"
#: A label that may be published.
LABEL = {
    "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
    "uri": "at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k",
    "val": "spam",
    "cts": "2026-01-01T00:00:00.000Z",
}

#: Short times, so that tests wait for events and not for timers.
QUICK: dict[str, Any] = {
    "port": 0,
    "migrate": False,
    "poll_seconds": 0.2,
    "gather_seconds": 0.0,
    "drain_seconds": 1.0,
}


@dataclass
class Server:
    """A server running in this process."""

    app: App
    url: str
    stream_url: str


#: `async with run_server(**settings) as server`
RunServer = Callable[..., AbstractAsyncContextManager[Server]]


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[Server]:
    """Run an app that the test made; does not wait for its sequencer."""
    async with app.running() as port:
        url = f"http://127.0.0.1:{port}"
        yield Server(app, url, f"{url}/stream")


@dataclass
class Gate:
    """Holds each caller until the gate is opened."""

    #: Set when a caller waits at the gate.
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def hold(self) -> None:
        self.reached.set()
        await self.opened.wait()

    def before(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Return a function that waits at the gate and then calls `call`."""

        async def held(*args: Any, **kwargs: Any) -> Any:
            await self.hold()
            return await call(*args, **kwargs)

        return held

    def after(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Return a function that calls `call` and waits at the gate before it returns."""

        async def held(*args: Any, **kwargs: Any) -> Any:
            result = await call(*args, **kwargs)
            await self.hold()
            return result

        return held


class AtSeq:
    """A subscriber that notices when the sequencer has published a seq."""

    def __init__(self, seq: int) -> None:
        self._seq = seq
        self.reached = asyncio.Event()

    def push(self, chunk: Chunk) -> None:
        if chunk.end >= self._seq:
            self.reached.set()


async def until_head(server: Server, seq: int) -> None:
    """Wait until the sequencer has given all events up to `seq` to its subscribers."""
    sequencer = server.app.feed.sequencer
    if sequencer.head >= seq:
        return
    watcher = AtSeq(seq)
    sequencer.subscribers.add(watcher, None)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await watcher.reached.wait()
    finally:
        sequencer.subscribers.remove(watcher, None)


@contextmanager
def away(database: TestDatabase) -> Iterator[None]:
    """During the block the database accepts no connection; open ones are ended."""
    admin = psycopg2.connect(make_dsn(database.dsn, dbname="postgres"))
    admin.autocommit = True
    try:
        with admin.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                (database.name,),
            )
            try:
                yield
            finally:
                cursor.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
    finally:
        admin.close()


def insert_large(database: TestDatabase, count: int) -> None:
    """Store labels of 8 KiB; a hundred fill all buffers between the server and a reader."""
    database.execute(
        "INSERT INTO label (src, uri, cid, val, cts)"
        " SELECT 'did:plc:aaaaaaaaaaaaaaaaaaaaaaaa', 'at://x/' || n || repeat('x', 8000), '',"
        " 'spam', '2026-01-01T00:00:00.000Z' FROM generate_series(1, %s) AS n",
        (count,),
    )
