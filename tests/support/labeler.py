"""A labeler whose messages a test gives, and mirrors of it in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import libipld
from aiohttp import web
from aiohttp.test_utils import TestServer

from sse_labels.database.pool import Database
from sse_labels.mirror.following import Mirror
from sse_labels.mirror.upstream import Upstream

from support.database import TestDatabase

SRC = "did:plc:" + "s" * 24


def wire_label(number: int = 0, **more: Any) -> dict[str, Any]:
    """A label as a labeler sends it; fields that are None are left out."""
    label = {
        "ver": 1,
        "src": SRC,
        "uri": f"at://did:plc:{'b' * 24}/app.bsky.feed.post/3k{number}",
        "val": "spam",
        "cts": "2026-01-01T00:00:00.000Z",
        **more,
    }
    return {name: value for name, value in label.items() if value is not None}


def message(header: dict[str, Any], body: Any) -> bytes:
    """One message of an event stream."""
    return libipld.encode_dag_cbor(header) + libipld.encode_dag_cbor(body)


def labels_message(seq: int, *labels: Any) -> bytes:
    return message({"op": 1, "t": "#labels"}, {"seq": seq, "labels": list(labels)})


def info_message(name: str) -> bytes:
    return message({"op": 1, "t": "#info"}, {"name": name, "message": "as it is"})


def error_message(name: str) -> bytes:
    return message({"op": -1}, {"error": name, "message": "as it is"})


class Labeler:
    """Keeps labels by seq and sends them after the cursor, unless `say` does something else."""

    def __init__(self) -> None:
        self.labels: dict[int, list[Any]] = {}
        #: The cursors of all clients so far.
        self.cursors: list[int] = []
        #: Called first, with the socket and the cursor; True: the connection ends.
        self.say: Callable[[web.WebSocketResponse, int], Awaitable[bool]] | None = None
        #: More headers of the handshake's answer; or another answer.
        self.headers: dict[str, str] = {}
        self.refusal: web.StreamResponse | None = None
        self._changed = asyncio.Event()
        self.url = ""

    def add(self, *labels: Any) -> int:
        """Store labels as one message; return its seq."""
        seq = max(self.labels, default=0) + 1
        self.labels[seq] = list(labels)
        self._changed.set()
        self._changed = asyncio.Event()
        return seq

    async def handle(self, request: web.Request) -> web.StreamResponse:
        cursor = int(request.query["cursor"])
        self.cursors.append(cursor)
        if self.refusal is not None:
            return self.refusal
        socket = web.WebSocketResponse()
        socket.headers.update(self.headers)
        await socket.prepare(request)
        if self.say is not None and await self.say(socket, cursor):
            return socket
        if cursor > max(self.labels, default=0):
            await socket.send_bytes(error_message("FutureCursor"))
            await socket.close(code=1008)
            return socket
        listening = asyncio.create_task(socket.receive())
        while not listening.done():
            changed = asyncio.create_task(self._changed.wait())
            for seq in sorted(self.labels):
                if seq > cursor:
                    await socket.send_bytes(labels_message(seq, *self.labels[seq]))
                    cursor = seq
            await asyncio.wait({changed, listening}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        return socket


@asynccontextmanager
async def labeler() -> AsyncIterator[Labeler]:
    """Run a labeler."""
    made = Labeler()
    app = web.Application()
    app.router.add_get("/xrpc/com.atproto.label.subscribeLabels", made.handle)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/xrpc/com.atproto.label.subscribeLabels")).replace(
            "http", "ws", 1
        )
        yield made


@asynccontextmanager
async def mirroring(database: TestDatabase, url: str, **more: Any) -> AsyncIterator[Mirror]:
    """Mirror one upstream into a migrated database during the block."""
    edge = Database(
        database.dsn, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=1
    )
    connect = more.pop("connect", None) or edge.connect
    mirror_of = {key: more.pop(key) for key in ("first_cursor", "clock") if key in more}
    named = bool(more.keys() & {"did", "source_keys"})
    upstream = Upstream(url, **{"message_max_bytes": 1 << 20, "any_source": not named, **more})
    mirror = Mirror(upstream, connect, **mirror_of)
    running = asyncio.create_task(mirror.run())
    try:
        yield mirror
    finally:
        running.cancel()
        await asyncio.wait({running})
        edge.close()
        if not running.cancelled():
            running.result()
