"""What one client may take from the whole application."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import httpx

from support.database import TestDatabase
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
