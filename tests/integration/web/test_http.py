"""What HTTP expects beside streams and answers: methods, codings, handshakes, refusals."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sse_labels.protocol.xrpc import SUBSCRIBE_PATH
from sse_labels.publishing.tokens import add_token
from sse_labels.web.label_socket import MAX_MESSAGE_BYTES

from support.database import TestDatabase
from support.eventsource import EventSourceParser
from support.reading import PATIENCE_SECONDS, reading
from support.server import PUBLISH_TOKEN, RunServer, Server, until_head

QUERY_LABELS = "/xrpc/com.atproto.label.queryLabels"
LABEL = {
    "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
    "uri": "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb",
    "val": "spam",
    "cts": "2026-01-01T00:00:00.000Z",
}
EVENT_STREAM = {"Accept": "text/event-stream"}
READABLE = ["/", "/labels.js", "/stream", QUERY_LABELS, SUBSCRIBE_PATH, "/health/live",
            "/health/ready", "/metrics", "/streams"]  # fmt: skip


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client that may publish."""
    async with httpx.AsyncClient(
        base_url=server.url,
        timeout=PATIENCE_SECONDS,
        verify=False,
        headers={"Authorization": f"Bearer {PUBLISH_TOKEN}"},
    ) as made:
        yield made


async def exchange(server: Server, request: bytes) -> bytes:
    """Send bytes as they are; return what comes until the server closes."""
    port = int(server.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(PATIENCE_SECONDS):
        answer = await reader.read()
    writer.close()
    return answer


# Methods


@pytest.mark.parametrize("path", READABLE)
async def test_head_answers_as_get_does_without_a_body(
    client: httpx.AsyncClient, path: str
) -> None:
    params = {"uriPatterns": "*"} if path == QUERY_LABELS else {}
    async with client.stream("GET", path, params=params) as whole:
        pass
    head = await client.head(path, params=params)
    assert head.content == b""
    assert head.status_code == whole.status_code
    for name in ("Content-Type", "Cache-Control", "Sse-Labels-Head", "Content-Security-Policy"):
        assert head.headers.get(name) == whole.headers.get(name), name


async def test_head_of_a_stream_holds_no_place(run_server: RunServer) -> None:
    async with run_server(max_streams=1) as server, httpx.AsyncClient(verify=False) as client:
        for _ in range(3):
            assert (await client.head(server.stream_url)).status_code == 200
        assert server.app.site.streams.open == {}
        async with reading(server.stream_url) as reader:
            await reader.until_opened()
            full = await client.head(server.stream_url)
            assert full.status_code == 503
            answer = await exchange(
                server, b"HEAD /stream HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n"
            )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 200 OK", b"")


async def test_head_of_a_wrong_stream_says_so(client: httpx.AsyncClient) -> None:
    assert (await client.head("/stream?cursor=x")).status_code == 400
    assert (await client.head("/stream?cursor=99")).status_code == 400


@pytest.mark.parametrize("path", [*READABLE, "/labels", "/streams/abc"])
async def test_options_of_a_known_path_says_what_it_allows(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.options(path)
    assert (answer.status_code, answer.content) == (204, b"")
    allowed = set(answer.headers["Allow"].split(", "))
    wanted = {"/labels": {"POST"}, "/streams/abc": {"DELETE"}}.get(path, {"GET", "HEAD"})
    assert allowed == {*wanted, "OPTIONS"}


async def test_options_of_an_unknown_path_is_not_found(client: httpx.AsyncClient) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
    for more in ({}, headers):
        answer = await client.options("/nowhere", headers=more)
        assert (answer.status_code, answer.json()["error"]) == (404, "NotFound")


# CORS


async def preflight(client: httpx.AsyncClient, asked: str) -> str:
    answer = await client.options(
        QUERY_LABELS,
        headers={
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": asked,
        },
    )
    assert answer.status_code == 204
    return answer.headers["Access-Control-Allow-Headers"]


async def test_a_preflight_allows_the_headers_that_it_asks_for(client: httpx.AsyncClient) -> None:
    assert await preflight(client, "atproto-accept-labelers, x-a,X-B") == (
        "atproto-accept-labelers, x-a,X-B"
    )


@pytest.mark.parametrize(
    "asked", [b"", "x-\u00e9".encode(), b"x-\xe9"], ids=["empty", "not ASCII", "no text"]
)
async def test_a_preflight_for_no_list_of_headers_gets_the_usual_ones(
    server: Server, asked: bytes
) -> None:
    answer = await exchange(
        server,
        b"OPTIONS /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\nOrigin: https://a.example\r\n"
        b"Access-Control-Request-Method: GET\r\n"
        b"Access-Control-Request-Headers: " + asked + b"\r\n\r\n",
    )
    [allowed] = re.findall(rb"Access-Control-Allow-Headers: ([^\r]*)", answer)
    assert allowed == b"Authorization, Content-Type, Idempotency-Key, Last-Event-ID"


# Bodies


@pytest.mark.parametrize(
    ("coding", "encode"),
    [("identity", bytes), ("gzip", gzip.compress), ("GZIP", gzip.compress)],
)
async def test_a_body_in_a_known_coding_is_read(
    client: httpx.AsyncClient, database: TestDatabase, coding: str, encode: Any
) -> None:
    content = encode(json.dumps({"labels": [LABEL]}).encode())
    answer = await client.post("/labels", content=content, headers={"Content-Encoding": coding})
    assert answer.status_code == 201
    [stored] = database.stored()
    assert stored["seq"] == answer.json()["seqs"][0]


@pytest.mark.parametrize(
    "coding", ["br", "zstd", "compress", "gzip, gzip", "x-unknown", "gzip;q=1"]
)
async def test_a_body_in_another_coding_is_415_and_told_the_known_ones(
    client: httpx.AsyncClient, database: TestDatabase, coding: str
) -> None:
    answer = await client.post(
        "/labels", content=json.dumps({"labels": [LABEL]}), headers={"Content-Encoding": coding}
    )
    assert (answer.status_code, answer.json()["error"]) == (415, "UnsupportedMediaType")
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"
    assert database.stored() == []


async def test_a_byte_order_mark_in_front_of_a_body_is_skipped(
    client: httpx.AsyncClient, database: TestDatabase
) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"labels": [LABEL]}).encode()
    assert (await client.post("/labels", content=body)).status_code == 201
    assert len(database.stored()) == 1


async def test_a_label_that_states_a_field_twice_is_refused_and_nothing_stored(
    client: httpx.AsyncClient, database: TestDatabase
) -> None:
    label = json.dumps(LABEL)
    twice = label[:-1] + ', "neg": true, "neg": false}'
    answer = await client.post("/labels", content=f'{{"labels": [{label}, {twice}]}}')
    assert answer.status_code == 400
    assert answer.json()["message"] == "the name 'neg' stands twice in one object"
    assert database.stored() == []


# What is almost right


@pytest.mark.parametrize("path", ["/stream", SUBSCRIBE_PATH, QUERY_LABELS])
async def test_each_way_to_read_refuses_near_misses(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path, params={"uriPatterns": "*", "value": "spam"})
    assert answer.status_code == 400
    assert answer.json()["message"] == "unknown parameter 'value', expected 'values'"


async def test_the_list_of_streams_refuses_near_misses(
    run_server: RunServer, tmp_path: Path
) -> None:
    admin = add_token(tmp_path / "tokens", "olga", ["admin"])
    async with (
        run_server(publish_tokens_file=tmp_path / "tokens") as server,
        httpx.AsyncClient(verify=False) as client,
    ):
        headers = {"Authorization": f"Bearer {admin}"}
        answer = await client.get(f"{server.url}/streams?Sort=since", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["message"] == "unknown parameter 'Sort', expected 'sort'"


async def test_a_broken_percent_encoding_is_refused_on_every_path(server: Server) -> None:
    for target in ("/stream?values=caf%E9", f"{QUERY_LABELS}?uriPatterns=%zz", "/caf%E9"):
        answer = await exchange(
            server, f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.startswith(b"HTTP/1.1 400 "), target
        assert b"percent-encoding" in answer


# Where a polyfill resumes


async def test_a_polyfill_that_resumes_by_its_url_gets_what_follows_once(
    server: Server, database: TestDatabase
) -> None:
    database.insert(5)
    await until_head(server, 5)
    url = f"{server.stream_url}?cursor=1&lastEventId=3"
    async with reading(url) as reader:
        await reader.until_seq(5)
        assert reader.events == database.stored()[3:]


# Refusals


def blocks_of(body: bytes) -> EventSourceParser:
    parser = EventSourceParser()
    parser.feed(body)
    return parser


CLIENTS: list[tuple[str, dict[str, str], str]] = [
    ("?cursor=1", {"Last-Event-ID": "2"}, "2"),
    ("?cursor=1&lastEventId=2", {}, "2"),
    ("?cursor=1", {}, "1"),
    ("", {}, "3"),
    ("?snapshot=active", {}, "0"),
]


@pytest.mark.parametrize(("query", "headers", "expected"), CLIENTS)
@pytest.mark.parametrize("full", ["max_streams", "max_connections"])
async def test_a_refused_event_source_keeps_its_position(
    run_server: RunServer,
    database: TestDatabase,
    query: str,
    headers: dict[str, str],
    expected: str,
    full: str,
) -> None:
    database.insert(3)
    async with run_server(**{full: 1}) as server:
        await until_head(server, 3)
        async with reading(server.stream_url) as reader, httpx.AsyncClient(verify=False) as client:
            await reader.until_opened()
            answer = await client.get(
                server.stream_url + query, headers={**EVENT_STREAM, **headers}
            )
    parser = blocks_of(answer.content)
    assert answer.status_code == 200
    assert json.loads(parser.events[0].data)["error"] == "TooManyConnections"
    assert (parser.events[0].event, parser.last_event_id) == ("error", expected)


async def test_the_end_of_a_stream_carries_the_position(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    async with reading(f"{server.stream_url}?cursor=0") as reader:
        await reader.until_seq(3)
        server.app.site.streams.stop()
        await reader.until_closed()
    assert reader.last_id == "3"


# WebSocket handshakes


def handshake(version: str, protocol: str = "HTTP/1.1", key: bytes = b"0123456789abcdef") -> bytes:
    return (
        f"GET {SUBSCRIBE_PATH} {protocol}\r\nHost: a\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {base64.b64encode(key).decode()}\r\n"
        f"Sec-WebSocket-Version: {version}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("version", ["12", "14", "8", "x", ""])
async def test_a_handshake_of_another_version_is_told_the_one_spoken(
    client: httpx.AsyncClient, version: str
) -> None:
    answer = await client.get(
        SUBSCRIBE_PATH,
        headers={
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(),
            "Sec-WebSocket-Version": version,
        },
    )
    assert (answer.status_code, answer.json()["error"]) == (426, "UpgradeRequired")
    assert answer.headers["Sec-WebSocket-Version"] == "13"
    assert answer.headers["Upgrade"] == "websocket"


async def test_a_handshake_over_http_1_0_is_refused(server: Server) -> None:
    assert (await exchange(server, handshake("13", "HTTP/1.0"))).startswith(b"HTTP/1.0 400 ")


@pytest.mark.parametrize(("over", "lives"), [(0, True), (1, False)])
async def test_a_message_of_the_most_bytes_is_taken_and_of_one_more_is_not(
    server: Server, database: TestDatabase, over: int, lives: bool
) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(PATIENCE_SECONDS):
        writer.write(handshake("13"))
        await reader.readuntil(b"\r\n\r\n")
        size = MAX_MESSAGE_BYTES + over
        mask = bytes(4)
        writer.write(b"\x82\xfe" + size.to_bytes(2, "big") + mask + bytes(size))
        # A ping behind it is answered as long as the socket is not closed.
        writer.write(b"\x89\x82" + mask + b"hi")
        first = await reader.read(1)
    writer.close()
    assert (first == b"\x8a") == lives
