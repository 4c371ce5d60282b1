"""`subscribeLabels`: the lexicon's messages over a WebSocket, from the stream's outbox."""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from sse_labels.protocol import xrpc
from sse_labels.web import label_socket
from sse_labels.web.door.connection import CHATTER_MAX_BYTES

from support.database import TestDatabase, until
from support.reading import PATIENCE_SECONDS, reading
from support.server import RunServer, Server, insert_large

PATH = "/xrpc/com.atproto.label.subscribeLabels"
SIG = bytes(range(64))


class Subscriber:
    """One socket and the messages that came."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.events: list[dict[str, Any]] = []
        self.news: list[xrpc.Message] = []

    async def until_seq(self, seq: int) -> list[dict[str, Any]]:
        """Read until the event of `seq` has come; return all, in the JSON form of the stream."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not self.events or self.events[-1]["seq"] < seq:
                await self._next()
        return self.events

    async def until_closed(self) -> int | None:
        """Read to the end; return the close code."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self._next():
                pass
        return self.socket.close_code

    async def _next(self) -> bool:
        message = await self.socket.receive()
        if message.type is not WSMsgType.BINARY:
            assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING)
            return False
        decoded = xrpc.decode(message.data)
        if decoded.type == "#labels":
            [label] = decoded.body["labels"]
            if "sig" in label:
                label["sig"] = {"$bytes": b64encode(label["sig"]).decode().rstrip("=")}
            self.events.append(decoded.body)
        else:
            self.news.append(decoded)
        return True


def small_socket(address: Any) -> socket.socket:
    """Make a socket for which the kernel keeps next to nothing."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


@asynccontextmanager
async def subscribed(
    server: Server, query: str = "", *, small: bool = False, **more: Any
) -> AsyncIterator[Subscriber]:
    connector = aiohttp.TCPConnector(socket_factory=small_socket if small else None)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.ws_connect(f"{server.url}{PATH}{query}", **more) as connection,
    ):
        yield Subscriber(connection)


async def test_history_and_live_labels_arrive_as_on_the_event_stream(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    database.insert(1, cid="bafyreib2rxk3rh6kzwq", neg=True, exp="2030-01-01T00:00:00Z", sig=SIG)
    database.insert(1, val="ü\U0001f98b\u2028")
    async with (
        subscribed(server, "?cursor=0") as socket,
        reading(server.stream_url, cursor=0) as stream,
    ):
        await socket.until_seq(5)
        [last] = database.insert(1, val="live")
        assert await socket.until_seq(last) == await stream.until_seq(last) == database.stored()
        assert socket.news == []


async def test_without_a_cursor_only_live_labels_arrive(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    await until(lambda: server.app.feed.sequencer.head == 3)
    async with subscribed(server) as socket:
        [last] = database.insert(1)
        assert await socket.until_seq(last) == database.stored()[-1:]


async def test_a_cursor_resumes_after_it_and_a_filter_hides(
    server: Server, database: TestDatabase
) -> None:
    database.insert(4, val="spam")
    database.insert(4, val="rude")
    await until(lambda: server.app.feed.sequencer.head == 8)
    async with subscribed(server, "?cursor=2&values=rude") as socket:
        assert await socket.until_seq(8) == database.stored()[4:]


async def test_without_an_upgrade_it_is_the_event_stream(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    async with reading(f"{server.url}{PATH}", cursor=0) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert await stream.until_seq(3) == database.stored()


async def test_a_cursor_beyond_the_newest_is_a_future_cursor(server: Server) -> None:
    async with subscribed(server, "?cursor=77") as socket:
        assert await socket.until_closed() == xrpc.CLOSE_POLICY
        [error] = socket.news
    assert error.type is None
    assert error.body["error"] == "FutureCursor"
    assert "77" in error.body["message"]


async def test_a_cursor_below_the_floor_is_told_and_the_stream_goes_on(
    server: Server, database: TestDatabase
) -> None:
    database.insert(5)
    database.execute("UPDATE label_stream SET floor = 4")
    database.execute("DELETE FROM label WHERE id < 4")
    async with subscribed(server, "?cursor=1") as socket:
        assert await socket.until_seq(5) == database.stored()
        [info] = socket.news
    assert info.type == "#info"
    assert info.body["name"] == "OutdatedCursor"


async def test_a_consumer_that_lags_is_told_and_closed(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with (
        run_server(outbox_max_events=50, send_buffer_bytes=4096, slow_grace_seconds=30) as server,
        subscribed(server, small=True) as slow,
    ):
        await until(lambda: server.app.metrics.gauges["streams"]() == 1)
        [visit] = server.app.site.streams.open.values()
        await until(lambda: visit.outbox.caught_up)
        # One write, far larger than what the kernel takes; what comes next waits in the outbox.
        insert_large(database, 200)
        await until(lambda: server.app.metrics.events_delivered == 200)
        database.fill(60)
        await until(lambda: server.app.feed.sequencer.head == 260)
        database.insert(1)
        await until(lambda: server.app.metrics.count["queue_overflows"] == 1)
        assert await slow.until_closed() == xrpc.CLOSE_POLICY
        assert [message.body["error"] for message in slow.news] == ["ConsumerTooSlow"]
        assert slow.events == database.stored()[:200]
        await until(lambda: server.app.metrics.streams_ended["ConsumerTooSlow"] == 1)


async def test_a_server_that_stops_breaks_off_so_that_clients_come_back(
    run_server: RunServer,
) -> None:
    async with run_server() as server:
        connected = subscribed(server)
        socket = await connected.__aenter__()
        await until(lambda: server.app.metrics.gauges["streams"]() == 1)
        server.app.site.streams.stop()
        assert await socket.until_closed() == 1006
        assert socket.news == []
        await connected.__aexit__(None, None, None)
        await until(lambda: server.app.metrics.streams_ended["ServerStopping"] == 1)


async def test_a_full_server_breaks_off_so_that_clients_come_back(run_server: RunServer) -> None:
    async with run_server(max_streams=1) as server, subscribed(server):
        await until(lambda: server.app.metrics.gauges["streams"]() == 1)
        async with subscribed(server) as second:
            assert await second.until_closed() == 1006
        assert server.app.metrics.requests_refused["TooManyConnections"] == 1


async def test_a_wrong_handshake_is_answered_400(server: Server) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}{PATH}", headers=headers) as answer,
    ):
        assert answer.status == 400
        assert (await answer.json())["error"] == "InvalidRequest"


async def test_a_silent_socket_is_pinged_and_pings_are_answered(run_server: RunServer) -> None:
    async with (
        run_server(heartbeat_seconds=0.05) as server,
        subscribed(server, autoping=False) as subscriber,
    ):
        message = await subscriber.socket.receive(timeout=PATIENCE_SECONDS)
        assert message.type is WSMsgType.PING
        await subscriber.socket.ping(b"there?")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while message.type is not WSMsgType.PONG:
                message = await subscriber.socket.receive()
        assert message.data == b"there?"


async def test_a_client_that_floods_is_cut_and_one_that_pings_is_not(server: Server) -> None:
    frame = b"\x8a\x80\0\0\0\0"  # an empty pong, masked
    async with subscribed(server, autoping=False) as polite, subscribed(server) as flooding:
        transport = flooding.socket.get_extra_info("transport") or flooding.socket._conn.transport
        transport.write(frame * (CHATTER_MAX_BYTES // len(frame) + 1))
        assert await flooding.until_closed() == 1006
        for _ in range(100):
            await polite.socket.ping(b"x" * 120)
            message = await polite.socket.receive(timeout=PATIENCE_SECONDS)
            assert message.data == b"x" * 120
    await until(lambda: server.app.metrics.gauges["streams"]() == 0)


async def test_a_client_that_closes_leaves_nothing_behind(server: Server) -> None:
    async with subscribed(server) as socket:
        await until(lambda: server.app.metrics.gauges["streams"]() == 1)
        await socket.socket.close()
    await until(lambda: server.app.metrics.gauges["streams"]() == 0)
    await until(lambda: server.app.metrics.streams_ended["ClientGone"] == 1)


async def test_a_message_that_is_too_long_ends_the_connection(server: Server) -> None:
    async with subscribed(server) as subscriber:
        await subscriber.socket.send_bytes(b"x" * 5000)
        assert await subscriber.until_closed() == 1009
    await until(lambda: server.app.metrics.gauges["streams"]() == 0)


async def test_messages_are_encoded_once_for_all_sockets(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counted(seq: int, label: dict[str, Any]) -> bytes:
        encoded.append(seq)
        return xrpc.encode_labels(seq, label)

    monkeypatch.setattr(label_socket, "encode_labels", counted)
    async with subscribed(server) as one, subscribed(server) as two, subscribed(server) as three:
        await until(lambda: server.app.metrics.gauges["streams"]() == 3)
        database.insert(5)
        for each in (one, two, three):
            assert await each.until_seq(5) == database.stored()
    assert sorted(encoded) == [1, 2, 3, 4, 5]
