"""What one client may take from the whole application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import ujson

from sse_labels.publishing.tokens import add_token
from sse_labels.web.publish import LARGE_OF_ONE_AT_ONCE, SMALL_BODY_BYTES

from support.database import TestDatabase, until
from support.reading import reading
from support.server import PUBLISH_TOKEN, RunServer, Server

LABEL = {
    "src": "did:web:labeler.example",
    "uri": "did:web:account.example",
    "val": "spam",
    "cts": "2026-01-01T00:00:00Z",
}
EVENT_SOURCE = {"Accept": "text/event-stream"}


async def publish(server: Server, labels: int) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(
            f"{server.url}/labels",
            json={"labels": [LABEL] * labels},
            headers={"Authorization": f"Bearer {PUBLISH_TOKEN}"},
        )


async def get(url: str, headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
    """Ask on a connection of its own, which ends with the answer."""
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.get(url, headers=headers, params=query)


async def test_full_server_refuses_and_its_streams_go_on(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(max_connections=2) as server, AsyncExitStack() as streams:
        readers = [await streams.enter_async_context(reading(server.stream_url)) for _ in range(2)]
        for reader in readers:
            await reader.until_opened()
        refused = await get(f"{server.url}/health/live")
        assert (refused.status_code, refused.json()["error"]) == (503, "TooManyConnections")
        assert int(refused.headers["retry-after"]) >= 1
        browser = await get(server.stream_url, EVENT_SOURCE)
        assert browser.status_code == 200
        assert "event: error" in browser.text
        database.insert(3)
        for reader in readers:
            assert await reader.until_events(3) == database.stored()


async def test_client_behind_the_proxy_holds_as_many_streams_as_it_may(
    run_server: RunServer,
) -> None:
    async with run_server(max_per_address=1) as server, httpx.AsyncClient() as proxy:
        greedy = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9"}
        async with proxy.stream("GET", server.stream_url, headers=greedy) as first:
            assert first.status_code == 200
            refused = await get(server.stream_url, {"X-Forwarded-For": "203.0.113.9"})
            assert (refused.status_code, refused.json()["error"]) == (429, "TooManyFromAddress")
            assert refused.headers["retry-after"] == "30"
            browser = await get(server.stream_url, {**greedy, **EVENT_SOURCE})
            assert (browser.status_code, "TooManyFromAddress" in browser.text) == (200, True)
            other = {"X-Forwarded-For": "203.0.113.10"}
            async with proxy.stream("GET", server.stream_url, headers=other) as second:
                assert second.status_code == 200


async def test_publisher_over_its_rate_is_told_when_to_come_back(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(publish_rate_labels=1, publish_burst_labels=10) as server:
        assert (await publish(server, 10)).status_code == 201
        refused = await publish(server, 5)
        assert (refused.status_code, refused.json()["error"]) == (429, "RateLimited")
        assert 1 <= int(refused.headers["retry-after"]) <= 5
        assert (await publish(server, 11)).status_code == 413
        assert len(database.stored()) == 10


class LargeBody:
    """A request body of 16 MiB, most of it blanks, that stops in the middle until it may go on."""

    SIZE = 16 * 1024**2

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.sent = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        labels = ujson.dumps({"labels": [LABEL]}).encode()
        block = b" " * 65536
        while self.sent < self.SIZE:
            if self.sent >= self.SIZE // 2:
                await self.go_on.wait()
            self.sent += len(block)
            yield block
        yield labels


async def test_large_bodies_wait_for_their_share_unread_and_hold_up_nobody_else(
    run_server: RunServer, tmp_path: Path
) -> None:
    tokens = {name: add_token(tmp_path / "tokens", name, ["publish"]) for name in ("ada", "bob")}

    async def send(name: str, content: Any) -> int:
        answer = await client.post(
            f"{server.url}/labels",
            content=content,
            headers={"Authorization": f"Bearer {tokens[name]}"},
        )
        return answer.status_code

    async with (
        run_server(
            publish_tokens_file=tmp_path / "tokens", body_max_bytes=2 * LargeBody.SIZE
        ) as server,
        httpx.AsyncClient(timeout=60) as client,
        asyncio.TaskGroup() as tasks,
    ):
        slow = [LargeBody() for _ in range(LARGE_OF_ONE_AT_ONCE)]
        sending = [tasks.create_task(send("ada", body)) for body in slow]
        await until(lambda: all(body.sent >= body.SIZE // 2 for body in slow))
        waits = LargeBody()
        waits.go_on.set()
        waiting = tasks.create_task(send("ada", waits))
        await until(lambda: waits.sent)
        # Her small ones pass, and another's large ones, which came later.
        assert await send("ada", ujson.dumps({"labels": [LABEL]})) == 201
        other = LargeBody()
        other.go_on.set()
        assert await send("bob", other) == 201
        assert other.sent == other.SIZE
        assert waits.sent < waits.SIZE
        assert not waiting.done()
        for body in slow:
            body.go_on.set()
        assert [await task for task in (*sending, waiting)] == [201] * 3


async def test_large_bodies_that_do_not_come_give_their_share_back(run_server: RunServer) -> None:
    authorization = f"Authorization: Bearer {PUBLISH_TOKEN}"
    head = f"POST /labels HTTP/1.1\r\nHost: x\r\n{authorization}\r\nContent-Length: 999999\r\n\r\n"
    async with run_server(request_seconds=0.3) as server, AsyncExitStack() as stack:
        port = int(server.url.rpartition(":")[2])
        answers = []
        for _ in range(2 * LARGE_OF_ONE_AT_ONCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            writer.write(head.encode() + b" " * 1000)
            answers.append(reader.readline())
        body = ujson.dumps({"labels": [LABEL]}) + " " * SMALL_BODY_BYTES
        async with httpx.AsyncClient(timeout=60) as client:
            last = await client.post(
                f"{server.url}/labels",
                content=body,
                headers={"Authorization": f"Bearer {PUBLISH_TOKEN}"},
            )
        assert last.status_code == 201
        # Their time began when they had their share.
        assert {line.split()[1] for line in await asyncio.gather(*answers)} == {b"408"}
