"""`GET /stream` on a real database: the wire, cursors, filters, readers that stall, the end."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.errors import BrokenPromise, ConsumerTooSlow, SchemaError
from sse_labels.metrics import render
from sse_labels.web import stream as stream_module
from sse_labels.web.event_stream import EventStream

from support.database import TestDatabase, until
from support.reading import PATIENCE_SECONDS, Reader, reading
from support.server import (
    PUBLISH_TOKEN,
    QUICK,
    Gate,
    RunServer,
    Server,
    away,
    insert_large,
    serving,
    until_head,
)

#: Small buffers: a reader that takes nothing is stuck after a few large labels.
STALLING: dict[str, Any] = {
    "send_buffer_bytes": 4096,
    "page_max_events": 5,
    "outbox_max_events": 50,
}


@dataclass
class Wire:
    """One response's body, as it arrives."""

    response: httpx.Response
    _parts: AsyncIterator[str]
    text: str = ""

    async def until(self, pattern: str) -> re.Match[str]:
        """Read until the whole of what came matches a regular expression."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (match := re.fullmatch(pattern, self.text, re.DOTALL)) is None:
                self.text += await anext(self._parts)
        return match


@asynccontextmanager
async def wire(url: str, **query: Any) -> AsyncIterator[Wire]:
    """Open a stream without understanding it."""
    async with (
        httpx.AsyncClient(timeout=PATIENCE_SECONDS, verify=False) as client,
        client.stream("GET", url, params=query) as response,
    ):
        yield Wire(response, response.aiter_text())


def opening(start: int, rest: str) -> str:
    """A pattern of all that came: the opening in one block, its data as group 1, and `rest`."""
    return rf"retry: \d+\nid: {start}\nevent: info\ndata: ([^\n]+)\n\n{rest}"


async def get(url: str, method: str = "GET", **given: Any) -> httpx.Response:
    """Return the answer to a request of its own."""
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, verify=False) as client:
        return await client.request(method, url, **given)


async def caught_up(server: Server, streams: int) -> None:
    """Return when so many streams are live."""
    await until(
        lambda: (
            sum(visit.outbox.caught_up for visit in server.app.site.streams.open.values())
            == streams
        )
    )


# The wire


async def test_answers_with_the_headers_of_an_event_stream(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    await until_head(server, 3)
    async with wire(server.stream_url) as opened:
        response = opened.response
    assert response.status_code == 200
    assert response.http_version == "HTTP/1.1"
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Sse-Labels-Head"] == "3"
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in response.headers
    assert "Content-Encoding" not in response.headers


async def test_first_bytes_come_at_once_even_from_an_empty_table(server: Server) -> None:
    for query in ({}, {"cursor": 0}):
        async with wire(server.stream_url, **query) as opened:
            match = await opened.until(opening(0, rest=""))
            assert json.loads(match[1]) == {
                "name": "StreamOpened",
                "message": "streaming what comes after 0",
                "cursor": 0,
                "head": 0,
                "epoch": server.app.feed.sequencer.epoch,
                "heartbeatSeconds": server.app.settings.heartbeat_seconds,
            }
        assert opened.response.headers["Sse-Labels-Head"] == "0"


async def test_every_client_is_told_another_time_to_wait(run_server: RunServer) -> None:
    told = []
    async with run_server(retry_min_seconds=3.0, retry_max_seconds=4.0) as server:
        for _ in range(8):
            async with reading(server.stream_url) as reader:
                await reader.until_opened()
                assert reader.retry_ms is not None
                told.append(reader.retry_ms)
    assert all(3000 <= retry_ms <= 4000 for retry_ms in told)
    assert len(set(told)) > 1


async def test_a_label_is_an_id_and_one_line_of_data(
    server: Server, database: TestDatabase
) -> None:
    database.insert(1, cid="bafyreiabc", neg=True, exp="2027-01-01T00:00:00Z", sig=b"\x00\xff\x01")
    async with wire(server.stream_url, cursor=0) as opened:
        match = await opened.until(opening(0, rest=r"id: 1\ndata: ([^\n]+)\n\n"))
    assert json.loads(match[2]) == database.stored()[0]


async def test_an_http_1_0_client_gets_the_bare_bytes(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    async with asyncio.timeout(PATIENCE_SECONDS):
        writer.write(b"GET /stream?cursor=0 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readuntil(b"id: 3\n") + await reader.readuntil(b"\n\n")
        await caught_up(server, 1)
        database.insert(2)
        body += await reader.readuntil(b"id: 5\n") + await reader.readuntil(b"\n\n")
        server.app.site.streams.stop()
        body += await reader.read()
    writer.close()
    await writer.wait_closed()
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"keep-alive" not in head.lower()
    assert body.startswith(b"retry: ")
    response = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=body)
    blocks = list(EventSource(response).iter_sse())
    events = [json.loads(block.data) for block in blocks if block.event == "message" and block.data]
    assert events == database.stored()
    assert json.loads(blocks[-1].data)["error"] == "ServerStopping"
    assert body.endswith(b"\n\n")


# Cursors


@pytest.mark.parametrize("source", ["database", "ring"])
async def test_resumes_after_its_cursor(
    run_server: RunServer, database: TestDatabase, source: str
) -> None:
    # The header, the query, what is then the cursor: the header wins.
    cases: list[tuple[str | None, str | None, int]] = [
        ("4", None, 4),
        (None, "4", 4),
        ("6", "2", 6),
        ("2", "6", 2),
        ("0", None, 0),
        (None, "0", 0),
        ("0", "9", 0),
        (None, "00000004", 4),
    ]
    if source == "database":
        database.insert(8)
    async with run_server() as server, AsyncExitStack() as stack:
        if source == "ring":
            database.insert(8)
            await until_head(server, 8)
        readers = []
        for header, query, after in cases:
            given = {} if query is None else {"cursor": query}
            opening = reading(server.stream_url, last_event_id=header, **given)
            readers.append(await stack.enter_async_context(opening))
            assert await readers[-1].until_opened() == after
        await caught_up(server, len(cases))
        count = server.app.metrics.count
        if source == "ring":
            assert (count["backfill_pages"], count["ring_hits"]) == (0, len(cases))
        else:
            assert (count["backfill_pages"] > 0, count["ring_hits"]) == (True, 0)
        database.insert(1)
        for reader in readers:
            await reader.until_seq(9)
    for reader, (_, _, after) in zip(readers, cases, strict=True):
        assert reader.events == database.stored(after=after)


async def test_without_a_cursor_only_what_is_new_arrives(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(5)
    async with run_server() as server:
        database.insert(5)
        await until_head(server, 10)
        async with reading(server.stream_url) as reader:
            assert await reader.until_opened() == 10
            assert reader.events == []
            await caught_up(server, 1)
            database.insert(3)
            await reader.until_events(3)
        assert server.app.metrics.count["backfill_pages"] == 0
    assert reader.events == database.stored(after=10)


async def test_at_the_head_nothing_comes_until_something_is_new(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(5)
    async with run_server() as server, reading(server.stream_url, cursor=5) as reader:
        assert await reader.until_opened() == 5
        await caught_up(server, 1)
        database.insert(2)
        await reader.until_seq(7)
    assert reader.events == database.stored(after=5)


async def test_a_cursor_that_this_process_is_behind_of_is_waited_for(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.insert(2)
    await until_head(server, 2)
    gate = Gate()
    store = server.app.feed.store
    monkeypatch.setattr(store, "rows_after", gate.before(store.rows_after))
    database.insert(4)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await gate.reached.wait()
    async with (
        reading(server.stream_url, last_event_id="4") as reader,
        reading(server.stream_url, last_event_id="6", values="spam") as at_newest,
    ):
        assert reader.response.headers["Sse-Labels-Head"] == "2"
        assert await reader.until_opened() == 4
        assert await at_newest.until_opened() == 6
        beyond = await get(server.stream_url, headers={"Last-Event-ID": "7"})
        assert (beyond.status_code, beyond.json()["error"]) == (400, "FutureCursor")
        gate.opened.set()
        await reader.until_seq(6)
        database.insert(1)
        await reader.until_seq(7)
        await at_newest.until_seq(7)
    assert reader.events == database.stored(after=4)
    assert at_newest.events == database.stored(after=6)


async def test_a_cursor_beyond_what_the_database_knows_is_refused(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(3)
    # An id that was taken and given up is known too: a later client may have been told of it.
    database.execute("SELECT nextval('label_id_seq')")
    async with run_server() as server:
        for cursor, status in ((3, 200), (4, 200), (5, 400), (2**63 - 1, 400)):
            async with wire(server.stream_url, cursor=cursor) as opened:
                assert opened.response.status_code == status
        answer = await get(server.stream_url, params={"cursor": 5}, headers=EVENT_SOURCE)
        # For good, for a browser too: this client's past is not this database's.
        assert answer.status_code == 400
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.json()["error"] == "FutureCursor"
        assert "5" in answer.json()["message"]


async def test_a_browser_is_told_to_come_back_when_its_cursor_cannot_be_looked_up(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    await until_head(server, 3)
    with away(database):
        # The header of a neighbour's client that was milliseconds ahead.
        answer = await get(server.stream_url, headers={"Last-Event-ID": "4"})
        assert (answer.status_code, answer.json()["error"]) == (503, "NotReady")
        async with reading(server.stream_url, last_event_id="4") as refused:
            await refused.until_closed()
        assert [error["error"] for _, error in refused.news] == ["NotReady"]


EVENT_SOURCE = {"Accept": "text/event-stream"}


@pytest.mark.parametrize("kept", ["rows", "nothing"])
async def test_below_the_floor_the_reader_is_told_and_goes_on_from_there(
    run_server: RunServer, database: TestDatabase, kept: str
) -> None:
    database.insert(12)
    floor = 8 if kept == "rows" else 13
    database.execute("UPDATE label_stream SET floor = %s", (floor,))
    database.execute("DELETE FROM label WHERE id < %s", (floor,))
    async with (
        run_server() as server,
        reading(server.stream_url, cursor=2) as reader,
        reading(server.stream_url, cursor=floor - 1) as inside,
    ):
        news = await reader.until_news("info")
        assert reader.events == []
        assert news["name"] == "OutdatedCursor"
        assert str(floor) in news["message"]
        await reader.until_seq(12)
        await inside.until_opened()
        await caught_up(server, 2)
        database.insert(1)
        await reader.until_seq(13)
        await inside.until_seq(13)
    assert reader.events == inside.events == database.stored()
    assert [name for name, _ in reader.news] == ["info"]
    assert inside.news == []


# What cannot be foreseen


@pytest.mark.parametrize(
    ("kind", "said", "how"),
    [
        (BrokenPromise, ("a hole after 3",), "BrokenPromise"),
        (SchemaError, ("label.id", "no sequence", "one"), "InternalServerError"),
    ],
)
async def test_a_stream_that_fails_says_so_and_from_where_to_go_on(
    run_server: RunServer,
    database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
    said: tuple[str, ...],
    how: str,
) -> None:
    caplog.set_level("INFO")

    async def fail(*_: object) -> None:
        # A new one each time: its traceback would keep the connection for the tests after this.
        raise kind(*said)

    database.fill(5)
    async with run_server() as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.app.feed.pages, "read", fail)
            async with wire(server.stream_url, cursor=2) as opened:
                end = await opened.until(
                    opening(2, rest=r"retry: \d+\nid: 2\nevent: error\ndata: ([^\n]+)\n\n")
                )
        last = json.loads(end[2])
        assert (last["error"], last["cursor"]) == ("InternalServerError", 2)
        await until(lambda: not server.app.site.streams.open)
        assert server.app.metrics.streams_ended[how] == 1
        [line] = [line for line in caplog.text.splitlines() if "stream closed: " in line]
        assert f" how={how} " in line
        async with reading(server.stream_url, cursor=2) as reader:
            await reader.until_seq(5)


# Heartbeats


async def test_silence_is_broken_by_a_comment(run_server: RunServer) -> None:
    async with run_server(heartbeat_seconds=0.05) as server, wire(server.stream_url) as opened:
        await opened.until(opening(0, rest=r"(:[^\n]*\n\n){3,}"))


async def test_a_reader_whose_filter_hides_all_is_told_the_position(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with (
        run_server(heartbeat_seconds=0.05) as server,
        wire(server.stream_url, values="never") as opened,
    ):
        await caught_up(server, 1)
        database.insert(3)
        # Then comments again: a position is told once.
        await opened.until(opening(0, rest=r"(:[^\n]*\n\n)*id: 3\n\n(:[^\n]*\n\n){2,}"))


async def test_a_reader_whose_filter_hid_its_history_is_told_the_position_at_once(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(7)
    caught_up_at = r"id: {0}\nevent: info\ndata: [^\n]*CaughtUp[^\n]*\n\n"
    # Far longer than the test: no heartbeat can be what tells it.
    async with run_server(heartbeat_seconds=3600) as server:
        async with wire(server.stream_url, cursor=2, values="never") as opened:
            await opened.until(opening(2, rest=caught_up_at.format(7)))
        database.insert(2)
        await until_head(server, 9)
        async with wire(server.stream_url, cursor=8, values="never") as opened:
            await opened.until(opening(8, rest=caught_up_at.format(9)))


async def test_a_reader_is_told_where_history_ends_when_that_is_at_no_label(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(2)
    database.execute("SELECT nextval('label_id_seq')")
    async with run_server(heartbeat_seconds=0.05) as server:
        await until_head(server, 3)
        async with reading(server.stream_url, cursor=0) as reader:
            assert await reader.until_news("info") == {
                "name": "CaughtUp",
                "message": "this is all up to seq 3; what follows is live",
                "seq": 3,
            }
            assert (reader.events, reader.last_id) == (database.stored(), "3")


async def test_heartbeats_come_while_history_lets_itself_be_waited_for(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.insert(3)
    async with run_server(heartbeat_seconds=0.05) as server:
        gate = Gate()
        monkeypatch.setattr(server.app.feed.pages, "read", gate.before(server.app.feed.pages.read))
        async with wire(server.stream_url, cursor=0) as opened:
            await opened.until(opening(0, rest=r"(:[^\n]*\n\n){2,}"))
            gate.opened.set()
            await opened.until(r".*id: 3\ndata: [^\n]+\n\n")


# Filters

A = "did:plc:" + "a" * 24
B = "did:plc:" + "b" * 24
POSTS = ("at://did:plc:x/app.bsky.feed.post/1", "at://did:plc:x/app.bsky.feed.post/10")
URIS = (*POSTS, "at://did:plc:x", "did:plc:x", "at://did:plc:y/app_bsky%feed/1")

FILTERS: list[dict[str, list[str]]] = [
    {"sources": [A]},
    {"sources": [A, B]},
    {"sources": ["did:plc:nobody"]},
    {"values": ["spam"]},
    {"values": ["spam", "!hide"]},
    {"values": ["Spam"]},
    {"uriPatterns": [POSTS[0]]},
    {"uriPatterns": [POSTS[0] + "*"]},
    {"uriPatterns": ["at://did:plc:x*", "did:plc:x"]},
    {"uriPatterns": ["at://did:plc:y/app_bsky%*"]},
    {"uriPatterns": ["at://did:plc:y/app-bsky%*", "at://did:plc:_*"]},
    {"uriPatterns": ["*"], "sources": [B]},
    {"sources": [A], "uriPatterns": ["at://*"], "values": ["spam", "porn"]},
    {"sources": [B], "uriPatterns": [POSTS[1], "did:*"], "values": ["!hide", "spam"]},
]


def insert_variety(database: TestDatabase) -> None:
    """Every combination of source, URI and value once."""
    for src in (A, B):
        for val in ("spam", "porn", "!hide"):
            database.execute(
                "INSERT INTO label (src, uri, cid, val, cts)"
                " SELECT %s, uri, '', %s, '2026-01-01T00:00:00Z' FROM unnest(%s) AS uri",
                (src, val, list(URIS)),
            )


def passing(events: Sequence[dict[str, Any]], asked: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What a filter lets through, written down a second time and on purpose."""

    def passes(label: dict[str, Any]) -> bool:
        patterns = asked.get("uriPatterns")
        return (
            label["src"] in asked.get("sources", [label["src"]])
            and label["val"] in asked.get("values", [label["val"]])
            and (
                patterns is None
                or any(
                    label["uri"].startswith(pattern[:-1])
                    if pattern.endswith("*")
                    else label["uri"] == pattern
                    for pattern in patterns
                )
            )
        )

    return [event for event in events if passes(event["labels"][0])]


async def test_filters_show_the_same_of_history_ring_and_live(
    run_server: RunServer, database: TestDatabase
) -> None:
    insert_variety(database)
    async with (
        run_server(page_max_events=7, heartbeat_seconds=0.05) as server,
        AsyncExitStack() as s,
    ):

        async def opened(cursor: int) -> list[Reader]:
            return [
                await s.enter_async_context(reading(server.stream_url, cursor=cursor, **asked))
                for asked in FILTERS
            ]

        from_database = await opened(0)
        assert server.app.metrics.count["ring_hits"] == 0
        await caught_up(server, len(FILTERS))
        insert_variety(database)
        await until_head(server, 60)
        pages = server.app.metrics.count["backfill_pages"]
        from_ring = await opened(37)
        for reader in (*from_database, *from_ring):
            await reader.until_seq(60)
        assert server.app.metrics.count["backfill_pages"] == pages
        assert server.app.metrics.count["ring_hits"] == len(FILTERS)
        await caught_up(server, 2 * len(FILTERS))
        insert_variety(database)
        for reader in (*from_database, *from_ring):
            await reader.until_seq(90)
    for asked, whole, part in zip(FILTERS, from_database, from_ring, strict=True):
        assert whole.events == passing(database.stored(), asked), asked
        assert part.events == passing(database.stored(after=37), asked), asked
    assert any(reader.events == [] for reader in from_database)


# Readers that stall


@asynccontextmanager
async def frozen(server: Server, path: str = "/stream") -> AsyncIterator[socket.socket]:
    """A client that asks for a stream and then reads nothing."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        streams = len(server.app.site.streams.open)
        await loop.sock_connect(client, ("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: len(server.app.site.streams.open) == streams + 1)
        yield client


async def until_reset(client: socket.socket) -> bytes:
    """Return what was still on its way when the connection was reset; fail on an orderly end."""
    received = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(ConnectionResetError):
            while part := await asyncio.get_running_loop().sock_recv(client, 65536):
                received += part
    return received


async def test_a_reader_that_takes_nothing_is_reset_and_the_others_get_everything(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with (
        run_server(**STALLING, slow_grace_seconds=0.2, send_timeout_seconds=30) as server,
        reading(server.stream_url, cursor=0) as one,
        reading(server.stream_url, cursor=0) as other,
        frozen(server) as client,
    ):
        await caught_up(server, 3)
        stalled = next(
            visit.outbox
            for visit in server.app.site.streams.open.values()
            if visit.outbox.position == 0
        )
        for seq in range(10, 201, 10):
            insert_large(database, 10)
            await asyncio.gather(one.until_seq(seq), other.until_seq(seq))
        metrics = server.app.metrics
        await until(lambda: metrics.streams_ended["ConsumerTooSlow"] == 1)
        assert metrics.count["queue_overflows"] == 1
        # What waited for it is freed, and it was never more than the bound and a chunk.
        assert stalled.queued == 0
        received = await until_reset(client)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert len(received) < 100_000
        assert len(server.app.site.streams.open) == 2
        database.insert(1)
        await asyncio.gather(one.until_seq(201), other.until_seq(201))
        rendered = render([metrics.numbers()]).decode()
        assert 'sse_labels_streams_ended_total{how="ConsumerTooSlow"} 1.0' in rendered
    assert one.events == other.events == database.stored()


async def test_a_reader_that_takes_nothing_is_cut_within_the_grace(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with (
        run_server(**STALLING, slow_grace_seconds=0.5, send_timeout_seconds=600) as server,
        frozen(server) as client,
    ):
        await caught_up(server, 1)
        insert_large(database, 200)
        metrics = server.app.metrics
        await until(lambda: metrics.count["queue_overflows"] == 1)
        # Sooner than the send time-out, which alone would let the test run out of patience.
        await until(lambda: metrics.streams_ended["ConsumerTooSlow"] == 1)
        await until_reset(client)


async def test_a_reader_that_takes_nothing_of_its_history_is_cut_after_the_send_timeout(
    run_server: RunServer, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    insert_large(database, 200)
    async with (
        run_server(**STALLING, slow_grace_seconds=600, send_timeout_seconds=0.3) as server,
        frozen(server, "/stream?cursor=0") as client,
    ):
        metrics = server.app.metrics
        await until(lambda: metrics.streams_ended["SendTimeout"] == 1)
        await until_reset(client)
        assert metrics.count["queue_overflows"] == 0
        # What it did not take was not read from the database either, but for the next page.
        assert metrics.count["backfill_pages"] < 10
        [line] = [line for line in caplog.text.splitlines() if "stream closed: " in line]
        assert " how=SendTimeout " in line


async def test_a_slow_reader_that_drains_within_the_grace_is_told_where_to_go_on(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with (
        run_server(outbox_max_events=50, send_buffer_bytes=4096, slow_grace_seconds=30) as server,
        reading(server.stream_url) as slow,
    ):
        await slow.until_opened()
        await caught_up(server, 1)
        # One write, far larger than what the kernel takes; what comes next waits in the outbox.
        insert_large(database, 200)
        await until_head(server, 200)
        await until(lambda: server.app.metrics.events_delivered == 200)
        database.fill(60)
        await until_head(server, 260)
        database.insert(1)
        metrics = server.app.metrics
        await until(lambda: metrics.count["queue_overflows"] == 1)
        assert metrics.streams_ended["ConsumerTooSlow"] == 0
        error = await slow.until_news("error")
        await slow.until_closed()
        assert error["error"] == "ConsumerTooSlow"
        assert error["cursor"] == int(slow.last_id) == slow.events[-1]["seq"] == 200
        await until(lambda: metrics.streams_ended["ConsumerTooSlow"] == 1)
        async with reading(server.stream_url, cursor=error["cursor"]) as again:
            await again.until_seq(261)
    assert slow.events + again.events == database.stored()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[EventStream]:
    """The streams that were opened, oldest first."""
    opened: list[EventStream] = []
    write = EventStream.write_eof

    async def noted(stream: EventStream, data: bytes = b"") -> None:
        opened.append(stream)
        await write(stream, data)

    monkeypatch.setattr(EventStream, "write_eof", noted)
    return opened


async def test_the_last_event_is_not_waited_for_longer_than_the_grace(
    run_server: RunServer, streams: list[EventStream]
) -> None:
    async with (
        run_server(slow_grace_seconds=0.2, send_timeout_seconds=0.2) as server,
        frozen(server) as client,
    ):
        await caught_up(server, 1)
        # The kernel is full to the brim, and the server has nothing left to write.
        with socket.socket(
            fileno=socket.dup(streams[0].delivery._transport.get_extra_info("socket").fileno())
        ) as raw:
            raw.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    raw.send(b":\n\n" * 1000)
            with pytest.raises(BlockingIOError):
                while True:
                    raw.send(b"\n")
        [outbox] = [visit.outbox for visit in server.app.site.streams.open.values()]
        outbox.close(ConsumerTooSlow("as if by an overflow"))
        ended = server.app.metrics.streams_ended
        await until(lambda: ended["ConsumerTooSlow"] == 1, seconds=3)
        await until_reset(client)


async def test_an_overflow_in_the_moment_of_the_send_timeout_disturbs_nobody(
    run_server: RunServer, database: TestDatabase, streams: list[EventStream]
) -> None:
    async with (
        run_server(**{**STALLING, "outbox_max_events": 10_000}, send_timeout_seconds=0.3) as server,
        frozen(server) as client,
    ):
        await caught_up(server, 1)
        insert_large(database, 200)
        await until(lambda: streams[0].delivery._deadline is not None)
        deadline = streams[0].delivery._deadline
        assert deadline is not None
        when = deadline.when()
        assert when is not None
        raised: list[Exception] = []

        def overflow() -> None:
            [outbox] = [visit.outbox for visit in server.app.site.streams.open.values()]
            try:
                outbox.close(ConsumerTooSlow("as if by an overflow, in the sequencer's task"))
            except Exception as error:
                raised.append(error)

        # The next callback after the one that ends the write, before the stream's task runs.
        asyncio.get_running_loop().call_at(math.nextafter(when, math.inf), overflow)
        await until(lambda: not server.app.site.streams.open)
        await until_reset(client)
    assert raised == []


# Readers that leave


@pytest.mark.parametrize("when", ["live", "page being read", "write stuck"])
async def test_a_reader_that_hangs_up_leaves_nothing_behind(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    insert_large(database, 200)
    async with run_server(**STALLING) as server:
        gate = Gate()
        if when == "page being read":
            monkeypatch.setattr(
                server.app.feed.store, "page", gate.before(server.app.feed.store.page)
            )
        before = asyncio.all_tasks()
        async with AsyncExitStack() as stack:
            for values in ("spam", "spam", "porn"):
                path = f"/stream?values={values}" + ("" if when == "live" else "&cursor=0")
                await stack.enter_async_context(frozen(server, path))
            if when == "live":
                await caught_up(server, 3)
                assert server.app.feed.sequencer.subscribers
            elif when == "page being read":
                await gate.reached.wait()
            else:
                await until(lambda: server.app.metrics.events_delivered > 0)
            assert asyncio.all_tasks() - before
        gate.opened.set()
        await until(lambda: not server.app.site.streams.open)
        await until(lambda: not asyncio.all_tasks() - before)
        assert not server.app.feed.sequencer.subscribers
        pages = server.app.feed.pages
        assert pages._reads._reads == pages._table_reads._reads == {}
        assert server.app.metrics.streams_ended == {"ClientGone": 3}
        assert "sse_labels_streams 0.0" in render([server.app.metrics.numbers()]).decode()


# A full server


async def test_a_full_server_tells_browsers_to_come_back_later(run_server: RunServer) -> None:
    async with run_server(max_streams=1) as server:
        async with reading(server.stream_url) as first:
            await first.until_opened()
            async with reading(server.stream_url, cursor=0) as refused:
                await refused.until_closed()
            [(event, error)] = refused.news
            assert event == "error"
            assert error["error"] == "TooManyConnections"
            assert refused.last_id == "0"
            assert refused.response.headers["Content-Type"].startswith("text/event-stream")
            assert refused.response.headers["Cache-Control"] == "no-cache, no-transform"
            # Ten times what others are told.
            assert refused.retry_ms is not None
            assert 20_000 <= refused.retry_ms <= 50_000
            assert len(server.app.site.streams.open) == 1
        await until(lambda: not server.app.site.streams.open)
        async with reading(server.stream_url) as next_one:
            await next_one.until_opened()
        assert server.app.metrics.requests_refused == {"TooManyConnections": 1}


async def test_a_full_server_answers_503_to_anything_else(run_server: RunServer) -> None:
    async with run_server(max_streams=1) as server, reading(server.stream_url) as first:
        await first.until_opened()
        for headers in ({"Accept": "*/*"}, {"Accept": "application/json"}):
            answer = await get(server.stream_url, headers=headers)
            assert answer.status_code == 503
            assert answer.json()["error"] == "TooManyConnections"
            assert int(answer.headers["Retry-After"]) > 0


# The end


async def test_a_stopping_server_ends_every_stream_and_nothing_is_lost(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_large(database, 200)
    async with AsyncExitStack() as stack:
        settings = {**STALLING, "outbox_max_events": 10_000, "slow_grace_seconds": 0.2}
        async with run_server(**settings, drain_seconds=30) as server:
            live = [await stack.enter_async_context(reading(server.stream_url)) for _ in range(3)]
            slow = await stack.enter_async_context(reading(server.stream_url, cursor=0))
            stuck = await stack.enter_async_context(frozen(server, "/stream?cursor=0"))
            await slow.until_events(20)
            await caught_up(server, 3)
            database.insert(5)
            for reader in live:
                await reader.until_seq(205)
            gate = Gate()
            monkeypatch.setattr(
                server.app.feed.store, "page", gate.before(server.app.feed.store.page)
            )
            waiting = await stack.enter_async_context(
                reading(server.stream_url, cursor=1, values="spam")
            )
            await gate.reached.wait()
            await waiting.until_opened()
            begun = time.monotonic()
            slow_reads_on = asyncio.create_task(slow.until_closed())
        assert time.monotonic() - begun < 15
        await slow_reads_on
        for reader in (*live, waiting):
            await reader.until_closed()
        for reader in (*live, waiting, slow):
            [(event, error)] = reader.news
            assert (event, error["error"]) == ("error", "ServerStopping")
            assert error["cursor"] == int(reader.last_id)
            assert reader.retry_ms is not None
            assert 2000 <= reader.retry_ms <= 5000
        await until_reset(stuck)
        assert server.app.metrics.streams_ended == {"ServerStopping": 6}
        database.insert(5)
    async with run_server() as new:
        for reader, start in ((live[0], 200), (waiting, 1), (slow, 0)):
            async with reading(new.stream_url, last_event_id=reader.last_id) as again:
                await again.until_seq(210)
            assert reader.events + again.events == database.stored(after=start)


async def test_a_stopping_server_refuses_new_streams(server: Server) -> None:
    server.app.site.streams.stop()
    answer = await get(server.stream_url)
    assert (answer.status_code, answer.json()["error"]) == (503, "NotReady")
    assert int(answer.headers["Retry-After"]) > 0
    async with reading(server.stream_url) as refused:
        await refused.until_closed()
    [(event, error)] = refused.news
    assert (event, error["error"]) == ("error", "NotReady")


async def test_a_server_without_a_head_says_that_it_is_not_ready(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "START_WAIT_SECONDS", 0.05)
    # At its start the sequencer waits for transactions that took an id.
    writer = database.connect(autocommit=False)
    with writer.cursor() as cursor:
        cursor.execute("SELECT nextval('label_id_seq')")
    async with serving(App(Settings(**QUICK), database.dsn, PUBLISH_TOKEN)) as server:
        answer = await get(server.stream_url, params={"cursor": 0})
        assert (answer.status_code, answer.json()["error"]) == (503, "NotReady")
        assert int(answer.headers["Retry-After"]) > 0
        async with reading(server.stream_url, cursor=0) as refused:
            await refused.until_closed()
        [(event, error)] = refused.news
        assert (event, error["error"]) == ("error", "NotReady")
        assert refused.retry_ms is not None
        assert refused.retry_ms >= 20_000


async def test_a_stream_that_opens_early_waits_for_the_head(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = database.connect(autocommit=False)
    with writer.cursor() as cursor:
        cursor.execute("SELECT nextval('label_id_seq')")
    database.insert(3)
    async with serving(App(Settings(**QUICK), database.dsn, PUBLISH_TOKEN)) as server:

        async def read() -> Reader:
            async with reading(server.stream_url, cursor=0) as reader:
                await reader.until_seq(4)
            return reader

        gate = Gate()
        started = server.app.feed.sequencer.started
        monkeypatch.setattr(started, "wait", gate.before(started.wait))
        reads = asyncio.create_task(read())
        await gate.reached.wait()
        gate.opened.set()
        assert not started.is_set()
        writer.commit()
        reader = await reads
    assert reader.events == database.stored()


# What is counted


async def test_deliveries_are_counted(run_server: RunServer, database: TestDatabase) -> None:
    database.fill(20)
    async with run_server(page_max_events=6) as server:
        metrics = server.app.metrics
        async with wire(server.stream_url, cursor=0) as opened:
            match = await opened.until(opening(0, rest=r"(id: 1\n.*id: 20\ndata: [^\n]+\n\n)"))
            await caught_up(server, 1)
            assert metrics.events_delivered == 20
            assert metrics.count["backfill_pages"] == 4
            assert metrics.count["backfill_events"] == 20
            assert metrics.count["ring_hits"] == 0
            # All that was read, and what HTTP puts around the opening and each of the four pages.
            assert 0 <= metrics.bytes_delivered - len(match[0]) <= 5 * len("ffff\r\n\r\n")
        database.fill(5)
        await until_head(server, 25)
        async with reading(server.stream_url, cursor=22) as reader:
            await reader.until_seq(25)
            assert metrics.count["ring_hits"] == 1
        assert metrics.events_delivered == 23
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(25)
        assert metrics.events_delivered == 48
        # The three full pages were kept; what came after them is in the ring.
        assert metrics.count["backfill_page_hits"] == 3
        assert metrics.count["events_followed"] == 5


# Other origins

ALLOWED = "https://moderation.example"
OTHER = "http://localhost:3000"
EVIL = "https://moderation.example.evil.example"


@pytest.mark.parametrize(
    ("origins", "answered"),
    [
        ((ALLOWED,), {ALLOWED: ALLOWED, OTHER: None, EVIL: None, "null": None, None: None}),
        ((ALLOWED, OTHER), {ALLOWED: ALLOWED, OTHER: OTHER, EVIL: None}),
        (("*",), {ALLOWED: "*", EVIL: "*", None: None}),
        ((), {ALLOWED: None, "*": None}),
    ],
)
async def test_pages_of_other_origins_may_read_when_they_are_listed(
    run_server: RunServer, origins: tuple[str, ...], answered: dict[str | None, str | None]
) -> None:
    async with (
        run_server(cors_origins=origins) as server,
        httpx.AsyncClient(base_url=server.url, verify=False) as client,
    ):
        for origin, expected in answered.items():
            headers = {} if origin is None else {"Origin": origin}
            async with client.stream("GET", "/stream", headers=headers) as response:
                assert response.status_code == 200
            answers = [response]
            for path in ("/stream?cursor=x", "/health/live", "/nowhere"):
                answers += [await client.get(path, headers=headers)]
            if origins:
                wanted = {**headers, "Access-Control-Request-Method": "GET"}
                answers += [await client.options("/stream", headers=wanted)]
                assert answers[-1].status_code == 204
            for answer in answers:
                assert answer.headers.get("Access-Control-Allow-Origin") == expected
                assert "Access-Control-Allow-Credentials" not in answer.headers
                if expected is not None:
                    assert "Sse-Labels-Head" in answer.headers["Access-Control-Expose-Headers"]
                if expected not in (None, "*"):
                    assert answer.headers["Vary"] == "Origin"


async def test_a_preflight_says_what_may_be_sent(server: Server) -> None:
    for path in ("/stream", "/labels", "/xrpc/com.atproto.label.queryLabels"):
        answer = await get(
            server.url + path,
            "OPTIONS",
            headers={
                "Origin": "https://anyone.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, last-event-id",
            },
        )
        assert answer.status_code == 204
        assert answer.content == b""
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        methods = {"POST"} if path == "/labels" else {"GET", "HEAD"}
        assert set(answer.headers["Access-Control-Allow-Methods"].split(", ")) == {
            *methods,
            "OPTIONS",
        }
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization, last-event-id"
        assert int(answer.headers["Access-Control-Max-Age"]) > 0


# The page


class Resources(HTMLParser):
    """Whatever a page would load, or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loading = ("src", "href", "srcset", "data", "action", "poster", "background")
        self.found += [value or "" for name, value in attrs if name in loading]


async def test_the_page_brings_everything_with_it(server: Server) -> None:
    answer = await get(server.url + "/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert all(
        re.fullmatch(r"'([a-z-]+|sha256-[A-Za-z0-9+/]{43}=)'", value) for value in policy.values()
    )
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    resources = Resources()
    resources.feed(answer.text)
    assert resources.found
    for address in resources.found:
        assert re.fullmatch(r"[a-z/]+\.(css|js|svg)", address)
        file = await get(f"{server.url}/{address}")
        assert file.status_code == 200
        assert not re.search(r"@import|url\(|innerHTML|insertAdjacentHTML", file.text)
