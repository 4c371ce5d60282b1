"""Who may read and who may publish, over real sockets: tokens, what they narrow, and their end."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import jwt
import pytest

from sse_labels.protocol.xrpc import decode
from sse_labels.publishing.tokens import add_token
from sse_labels.web.auth import COOKIE, LEEWAY_SECONDS

from support.clock import Clock
from support.database import TestDatabase, until
from support.reading import reading
from support.server import PUBLISH_TOKEN, RunServer, Server

SECRET = "0123456789abcdef0123456789abcdef"
A, B = (f"did:plc:{letter * 24}" for letter in "ab")
LABEL = {"src": A, "uri": A, "val": "spam", "cts": "2026-01-01T00:00:00Z"}


def token(**claims: Any) -> str:
    now = time.time()
    return jwt.encode({"iat": now, "exp": now + 60, **claims}, SECRET, "HS256")


async def get(url: str, headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.get(url, headers=headers, params=query)


async def read_messages(socket: aiohttp.ClientWebSocketResponse) -> None:
    async for _ in socket:
        pass


async def publish(server: Server, publish_token: str) -> int:
    async with httpx.AsyncClient(timeout=20) as client:
        answer = await client.post(
            f"{server.url}/labels",
            json={"labels": [LABEL]},
            headers={"Authorization": f"Bearer {publish_token}"},
        )
    return answer.status_code


async def test_protected_labels_are_read_with_a_token_alone(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(3, src=A)
    async with run_server(jwt_secret=SECRET) as server:
        for url in (server.stream_url, f"{server.url}/xrpc/com.atproto.label.queryLabels"):
            refused = await get(url, uriPatterns="*")
            assert (refused.status_code, refused.json()["error"]) == (401, "AuthRequired")
            assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        async with reading(server.stream_url, cursor=0, access_token=token()) as reader:
            await reader.until_events(3)
        # A shared cache must keep nothing that came by a token.
        assert "no-store" in reader.response.headers["Cache-Control"]
        for headers in (
            {"Authorization": f"Bearer {token()}"},
            {"Cookie": f"{COOKIE}={token()}"},
        ):
            answer = await get(
                f"{server.url}/xrpc/com.atproto.label.queryLabels", headers, uriPatterns="*"
            )
            assert len(answer.json()["labels"]) == 3
    assert reader.events == database.stored()


async def test_token_narrows_what_is_seen_and_asking_for_more_is_forbidden(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(2, src=A)
    database.insert(2, src=B)
    narrow = token(sources=[A])
    async with run_server(jwt_secret=SECRET) as server:
        async with reading(server.stream_url, cursor=0, access_token=narrow) as reader:
            database.insert(1, src=B)
            [last] = database.insert(1, src=A)
            await reader.until_seq(last)
        refused = await get(server.stream_url, sources=B, access_token=narrow)
        assert (refused.status_code, refused.json()["error"]) == (403, "Forbidden")
        query = await get(
            f"{server.url}/xrpc/com.atproto.label.queryLabels",
            uriPatterns="*", access_token=narrow,
        )  # fmt: skip
    of_a = [event for event in database.stored() if event["labels"][0]["src"] == A]
    assert reader.events == of_a
    assert query.json()["labels"] == [event["labels"][0] for event in of_a]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_asking_for_more_is_forbidden_on_a_full_server_too(
    run_server: RunServer, method: str
) -> None:
    async with (
        run_server(jwt_secret=SECRET, max_streams=1) as server,
        reading(server.stream_url, access_token=token()) as reader,
        httpx.AsyncClient(verify=False) as client,
    ):
        await reader.until_opened()
        for path in ("/stream", "/xrpc/com.atproto.label.subscribeLabels"):
            # A browser that is told to come back would be told so for ever.
            answer = await client.request(
                method,
                f"{server.url}{path}",
                params={"sources": B, "access_token": token(sources=[A])},
                headers={"Accept": "text/event-stream"},
            )
            assert answer.status_code == 403
            assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]
    async with run_server(jwt_secret=SECRET) as server, httpx.AsyncClient(verify=False) as client:
        answer = await client.request(
            method,
            server.stream_url,
            params={"sources": B, "access_token": token(sources=[A])},
        )
        assert answer.status_code == 403


async def test_stream_ends_when_its_token_does(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(jwt_secret=SECRET) as server:
        ends = time.time() - LEEWAY_SECONDS + 1
        short = token(iat=ends - 60, exp=ends)
        async with reading(server.stream_url, access_token=short) as reader:
            [seq] = database.insert(1, src=A)
            await reader.until_seq(seq)
            await reader.until_closed()
            assert server.app.metrics.streams_ended["TokenExpired"] == 1
    [(kind, data)] = reader.news
    assert (kind, data["error"], data["cursor"]) == ("error", "TokenExpired", seq)
    assert time.time() >= ends + LEEWAY_SECONDS


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
@pytest.mark.parametrize("socket", [False, True], ids=["event stream", "WebSocket"])
async def test_token_that_the_clock_passes_by_ends_its_stream(
    run_server: RunServer, database: TestDatabase, socket: bool, busy: bool
) -> None:
    clock = Clock()
    made = jwt.encode({"iat": clock.now, "exp": clock.now + 3600}, SECRET, "HS256")
    headers = {"Authorization": f"Bearer {made}"}
    path = "/xrpc/com.atproto.label.subscribeLabels" if socket else "/stream"
    async with run_server(jwt_secret=SECRET, heartbeat_seconds=0.2) as server:
        server.app.site.auth.clock = clock
        metrics = server.app.metrics

        async def publish_on() -> None:
            for number in count(1):
                await asyncio.to_thread(database.insert, 1, src=A)
                await until(lambda n=number: metrics.streams_ended or metrics.events_delivered >= n)
                if metrics.streams_ended:
                    return

        async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as tasks:
            stream: Any
            if socket:
                stream = await session.ws_connect(server.url + path)
                tasks.create_task(read_messages(stream))
            else:
                stream = await session.get(server.url + path)
                tasks.create_task(stream.read())
            if busy:
                tasks.create_task(publish_on())
            [visit] = server.app.site.streams.open.values()
            clock.set(3600 + LEEWAY_SECONDS - 1)
            for _ in range(2):
                timer = visit.expiry
                await until(lambda timer=timer: visit.expiry is not timer)
            assert not metrics.streams_ended
            clock.set(86_400)
            await until(lambda: metrics.streams_ended)
    assert metrics.streams_ended == {"TokenExpired": 1}


async def test_no_token_reaches_a_log(
    run_server: RunServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    # httpx is the client; what it logs is not ours.
    for client in ("httpx", "httpcore"):
        monkeypatch.setattr(logging.getLogger(client), "disabled", True)
    good, expired = token(), token(exp=1)
    async with run_server(jwt_secret=SECRET) as server:
        async with reading(server.stream_url, access_token=good) as reader:
            await reader.until_opened()
        assert (await get(server.stream_url, access_token=expired)).status_code == 401
        assert (await get(server.stream_url, access_token=good, cursor="x")).status_code == 400
        assert (await get(f"{server.url}/nowhere", access_token=good)).status_code == 404
        assert await publish(server, "wrong-publish-token") == 401
        assert await publish(server, PUBLISH_TOKEN) == 201
        # Something of ours that fails, with the request at hand.
        monkeypatch.setattr(server.app.site.stream_handler, "_start", None)
        assert (await get(server.stream_url, access_token=good)).status_code == 500
    assert "a request failed" in caplog.text
    for secret in (good, expired, SECRET, PUBLISH_TOKEN, "wrong-publish-token"):
        assert secret not in caplog.text


async def test_publish_tokens_are_changed_without_a_restart(
    run_server: RunServer, database: TestDatabase, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    old = add_token(file, "old")
    async with run_server(publish_tokens_file=file) as server:
        assert await publish(server, old) == 201
        new = add_token(file, "new")
        assert (await publish(server, old), await publish(server, new)) == (201, 201)
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith("old ")))
        assert (await publish(server, old), await publish(server, new)) == (401, 201)
        assert await publish(server, PUBLISH_TOKEN) == 201
        watching = add_token(file, "watching", ["admin"])
        assert await publish(server, watching) == 403
    assert len(database.stored()) == 5


async def test_every_answer_carries_the_security_headers(run_server: RunServer) -> None:
    async with run_server(max_connections=3) as server:
        answers = [
            await get(server.url + path) for path in ("/", "/health/live", "/metrics", "/nowhere")
        ]
        answers.append(await get(server.stream_url, cursor="x"))
        async with AsyncExitStack() as streams:
            for _ in range(3):
                reader = await streams.enter_async_context(reading(server.stream_url))
                await reader.until_opened()
            answers += [reader.response, await get(server.stream_url)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 400, 200, 503]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers.get("Server", "sse_labels") == "sse_labels"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("origin", "reads"),
    [
        (None, True),
        ("http://127.0.0.1:4000", True),
        ("https://friend.example", False),
        ("https://else.example", False),
        ("null", False),
    ],
)
async def test_a_cookie_opens_no_socket_to_a_page_from_elsewhere(
    run_server: RunServer, database: TestDatabase, origin: str | None, reads: bool
) -> None:
    database.insert(1, src=A)
    headers = {"Cookie": f"{COOKIE}={token()}"} | ({"Origin": origin} if origin else {})
    async with run_server(jwt_secret=SECRET, cors_origins=("https://friend.example",)) as server:
        url = f"{server.url}/xrpc/com.atproto.label.subscribeLabels?cursor=0"
        async with aiohttp.ClientSession(headers=headers) as session:
            if reads:
                async with session.ws_connect(url) as socket:
                    assert decode(await socket.receive_bytes()).body["seq"] == 1
                return
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(url)
            assert refused.value.status == (401 if origin == "https://friend.example" else 403)


async def test_a_page_of_an_origin_that_may_read_opens_a_socket(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(1, src=A)
    async with run_server(jwt_secret=SECRET, cors_origins=("https://friend.example",)) as server:
        url = f"{server.url}/xrpc/com.atproto.label.subscribeLabels?cursor=0"
        headers = {"Origin": "https://friend.example"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.ws_connect(f"{url}&access_token={token()}") as socket,
        ):
            assert decode(await socket.receive_bytes()).body["seq"] == 1
