"""What a hostile review found: each of these once lost labels, memory or the server."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from sse_labels.database.pool import Database
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.errors import DatabaseUnavailable
from sse_labels.feed.chunk import encode_rows
from sse_labels.feed.ring import Ring
from sse_labels.protocol.filters import parse_filter
from sse_labels.protocol.label import Row
from sse_labels.web.query import QUERIES_AT_ONCE

from support.database import NOT_DURABLE, TestDatabase, reachable_directory, until
from support.reading import reading
from support.server import PUBLISH_TOKEN, Gate, RunServer, Server, insert_large, until_head


@contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    """Use up the low numbers, so that what is opened now gets one beyond select()'s reach."""
    with ExitStack() as opened:
        for _ in range(count):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


async def test_lost_database_is_survived_with_more_than_1024_descriptors(
    run_server: RunServer, database: TestDatabase
) -> None:
    with many_descriptors(1100):
        async with run_server() as server, reading(server.stream_url, cursor=0) as reader:
            reconnects = server.app.metrics.count
            database.terminate(database.backends("LISTEN"))
            await until(lambda: reconnects["database_reconnects"] >= 1)
            database.terminate(database.backends("SELECT id, src"))
            await until(lambda: reconnects["database_reconnects"] >= 2)
            database.insert(3)
            await reader.until_seq(3)
    assert reader.events == database.stored()


async def test_standby_is_no_server_to_read_from() -> None:
    with reachable_directory() as directory:
        server = EmbeddedPostgres(directory, settings=NOT_DURABLE)
        with server:
            pass
        (directory / "postgres" / "standby.signal").touch()
        with server:
            source = Database(
                server.dsn, connect_timeout_seconds=5, query_timeout_seconds=5, max_connections=1
            )
            with pytest.raises(DatabaseUnavailable, match="standby"):
                await source.connect()


def row(seq: int) -> tuple[object, ...]:
    uri = f"at://did:web:a.example/app.bsky.feed.post/{seq}"
    return Row(seq, "did:web:l.example", uri, "", "spam", None, "2026-01-01T00:00:00Z", None, None)


def test_ring_page_is_a_page_of_a_large_chunk_and_shared() -> None:
    ring = Ring(0, 2**30)
    rows = [row(seq) for seq in range(1, 4001)]
    ring.append(encode_rows(rows, start=0, end=4000, with_keys=True))
    page = ring.page(1500, 500, None)
    assert (page.start, page.end, len(page)) == (1500, 2000, 500)
    assert page.data == encode_rows(rows[1500:2000], start=1500, end=2000).data
    assert ring.page(1500, 500, None) is page
    rest = ring.page(3900, 500, None)
    assert (rest.start, rest.end, len(rest)) == (3900, 4000, 100)
    hidden = ring.page(0, 500, parse_filter([], [], ["porn"]))
    assert (hidden.start, hidden.end, len(hidden)) == (0, 500, 0)


def test_pages_kept_by_the_ring_are_bounded_in_bytes() -> None:
    rows = [row(seq) for seq in range(1, 1001)]
    whole = encode_rows(rows, start=0, end=1000, with_keys=True)
    ring = Ring(0, whole.nbytes)
    ring.append(whole)
    for cursor in range(900):
        page = ring.page(cursor, 100, None)
        assert (page.start, page.end, len(page)) == (cursor, cursor + 100, 100)
        assert sum(kept.nbytes for kept in ring._pages.values()) <= whole.nbytes // 8
    assert ring.page(899, 100, None) is page


def test_page_cut_from_several_chunks_ends_at_its_last_event() -> None:
    ring = Ring(0, 2**30)
    for seq in range(1, 11):
        ring.append(encode_rows([row(seq)], start=seq - 1, end=seq, with_keys=True))
    page = ring.page(2, 5, None)
    assert (page.start, page.end, list(page.seqs)) == (2, 7, [3, 4, 5, 6, 7])


async def test_query_is_not_answered_before_anything_is_settled(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(3)
    async with run_server() as server:
        server.app.feed.sequencer.started.clear()
        async with httpx.AsyncClient(verify=False) as client:
            answer = await client.get(
                f"{server.url}/xrpc/com.atproto.label.queryLabels", params={"uriPatterns": "*"}
            )
    assert (answer.status_code, answer.json()["error"]) == (503, "NotReady")


async def test_body_that_cannot_be_decoded_is_the_clients_mistake(
    server: Server, database: TestDatabase
) -> None:
    headers = {"Authorization": f"Bearer {PUBLISH_TOKEN}", "Content-Encoding": "gzip"}
    async with httpx.AsyncClient(verify=False) as client:
        for body in (b"no gzip", gzip.compress(b'{"labels":[')[:-6]):
            answer = await client.post(f"{server.url}/labels", content=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (400, "InvalidRequest")
    assert database.stored() == []


async def test_server_stops_in_time_with_readers_that_do_not_read(
    run_server: RunServer, database: TestDatabase
) -> None:
    with ExitStack() as frozen:
        async with run_server(
            drain_seconds=1.0, slow_grace_seconds=60, send_timeout_seconds=60,
            send_buffer_bytes=4096,
        ) as server:  # fmt: skip
            port = int(server.url.rpartition(":")[2])
            for _ in range(50):
                client = frozen.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port))
                client.sendall(b"GET /stream?cursor=0 HTTP/1.1\r\nHost: test\r\n\r\n")
            await until(lambda: len(server.app.site.streams.open) == 50)
            insert_large(database, 200)
            await until_head(server, 200)
            told = time.monotonic()
        # Without the bound it is the grace: a minute.
        assert time.monotonic() - told < 20
    assert sum(server.app.metrics.streams_ended.values()) == 50


async def test_filtered_catch_up_from_the_ring_lets_others_run(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(page_max_events=100) as server:
        async with reading(server.stream_url) as live:
            await live.until_opened()
            database.fill(3000)
            await live.until_events(3000)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        async with reading(server.stream_url, cursor=0, values="never") as reader:
            await reader.until_seq(3000)
        counting.cancel()
    assert reader.events == []
    assert turns >= 30


@pytest.mark.parametrize("line", ["GET /stream?cursor=\u0661 HTTP/1.1", "nonsense"])
async def test_what_is_no_http_is_refused_in_json_and_not_repeated(
    server: Server, line: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(f"{line}\r\nHost: test\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    assert " 400 " in answer.partition("\r\n")[0]
    assert answer.partition("\r\n\r\n")[2].startswith('{"error":"InvalidRequest"')
    assert "\u0661" not in answer


async def test_pages_that_many_filters_hide_are_counted_with_their_filters(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(1200)
    bound = 64 * 1024
    async with run_server(
        page_cache_max_bytes=bound, ring_max_bytes=0, page_max_events=100
    ) as server:
        for number in range(40):
            values = [f"v{number}-{place}" for place in range(90)]
            async with reading(server.stream_url, cursor=0, values=values) as reader:
                await reader.until_seq(1200)
        # Each entry has a filter of 90 entries, over 13 kB: a handful, and not eighty.
        assert 1 <= len(server.app.feed.pages._cache) <= 5


async def test_queries_of_clients_that_hang_up_keep_to_their_slots(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    under_way: list[int] = []
    async with run_server() as server:
        query = server.app.feed.store.query

        async def held(*given: Any, **more: Any) -> Any:
            under_way.append(1)
            gate.reached.set()
            await gate.opened.wait()
            return await query(*given, **more)

        monkeypatch.setattr(server.app.feed.store, "query", held)
        host, port = "127.0.0.1", int(server.url.rsplit(":", 1)[1])
        for cursor in range(20):
            _, writer = await asyncio.open_connection(host, port)
            path = f"/xrpc/com.atproto.label.queryLabels?uriPatterns=*&cursor={cursor}"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await gate.reached.wait()
            writer.transport.abort()
        await until(lambda: server.app.metrics.gauges["connections"]() == 0)
        assert len(under_way) == QUERIES_AT_ONCE
        # The others left the line when their clients did; whoever comes now is served.
        gate.opened.set()
        async with httpx.AsyncClient() as client:
            answer = await client.get(
                f"{server.url}/xrpc/com.atproto.label.queryLabels",
                params={"uriPatterns": "*", "cursor": 20},
            )
        assert answer.status_code == 200
        assert len(under_way) == QUERIES_AT_ONCE + 1
