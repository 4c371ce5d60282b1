"""One client cannot hurt the others: what many read of the table is read once, and by turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_network
from typing import Any

import aiohttp
import httpx
import jwt
import pytest

from support.database import TestDatabase, until
from support.reading import PATIENCE_SECONDS, reading
from support.server import RunServer, Server

SECRET = "a secret of the tests, long enough for HS256"
MANY, ONE = "127.0.0.2", "127.0.0.1"
QUERY = "/xrpc/com.atproto.label.queryLabels"


class Held:
    """A method of the store that waits until it may, one call after the other."""

    def __init__(self, patch: pytest.MonkeyPatch, server: Server, name: str, place: int) -> None:
        """What tells calls apart stands at `place` among their arguments."""
        self._call = getattr(server.app.feed.store, name)
        self._place = place
        self._permits = asyncio.Semaphore(0)
        self.begun: list[Any] = []
        patch.setattr(server.app.feed.store, name, self)

    async def __call__(self, *given: Any, **more: Any) -> Any:
        self.begun.append(given[self._place])
        await self._permits.acquire()
        return await self._call(*given, **more)

    def allow(self, calls: int = 1) -> None:
        for _ in range(calls):
            self._permits.release()


@asynccontextmanager
async def coming_from(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


async def test_one_reading_of_a_page_serves_all_filters(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.fill(65)
    stored = database.stored()
    values = ["spam", "porn", "rude", "nobody", "nobody-else"]
    async with run_server(page_max_events=10) as server, AsyncExitStack() as streams:
        page = Held(monkeypatch, server, "page", 0)
        readers = {
            value: await streams.enter_async_context(
                reading(server.stream_url, cursor=0, values=value)
            )
            for value in values
        }
        page.allow(1000)
        for value, reader in readers.items():
            await reader.until_seq(65)
            assert reader.events == [e for e in stored if e["labels"][0]["val"] == value]
    # The last page is not full, and kept by nobody.
    assert sorted(page.begun)[:6] == [0, 10, 20, 30, 40, 50]
    assert set(page.begun[6:]) <= {60}


async def test_one_reading_of_a_snapshot_serves_all_filters_of_uris(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(100)
    stored = [event for event in database.stored() if not event["labels"][0].get("neg")]
    async with run_server(page_max_events=1) as server:
        count = server.app.metrics.count
        read = []
        for pattern in ("at://did:plc:bbb*", stored[5]["labels"][0]["uri"], "*"):
            async with reading(server.stream_url, snapshot="active", uriPatterns=pattern) as reader:
                assert (await reader.until_news("info"))["seq"] == 100
            one = [event for event in stored if event["labels"][0]["uri"] == pattern]
            assert reader.events == (stored if pattern.endswith("*") else one)
            read.append(count["backfill_pages"])
    # But for the last page, which is kept by nobody.
    assert read[0] > 5
    assert read[2] - read[0] <= 2


async def test_one_of_another_address_has_its_turn_before_the_many(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.fill(60)
    async with (
        run_server(page_max_events=1, backfill_max_reads=2) as server,
        AsyncExitStack() as stack,
    ):
        page = Held(monkeypatch, server, "page", 0)
        many = await stack.enter_async_context(coming_from(MANY))
        for cursor in range(20):
            url = f"{server.stream_url}?cursor={cursor}&values=nobody-{cursor}"
            await stack.enter_async_context(many.get(url))
        await until(lambda: len(page.begun) == 2)
        one = await stack.enter_async_context(coming_from(ONE))
        await stack.enter_async_context(one.get(f"{server.stream_url}?cursor=50"))
        clients = server.app.feed.pages._reads._clients
        await until(lambda: f"address {ONE}" in clients)
        page.allow()
        await until(lambda: len(page.begun) == 3)
        assert page.begun[2] == 50
        # From here on the many have one place, and it has the other one.
        await until(lambda: clients[f"address {MANY}"].running == 1)
        page.allow(1000)
        await until(lambda: 59 in page.begun)


async def test_a_query_of_another_address_has_its_turn_before_the_many(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.fill(10)
    async with run_server() as server, AsyncExitStack() as stack:
        query = Held(monkeypatch, server, "query", 1)
        many = await stack.enter_async_context(coming_from(MANY))
        one = await stack.enter_async_context(coming_from(ONE))

        async def ask(session: aiohttp.ClientSession, cursor: int) -> int:
            url = f"{server.url}{QUERY}?uriPatterns=*&cursor={cursor}"
            async with session.get(url) as answer:
                return answer.status

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(many, cursor)) for cursor in range(12)]
            await until(lambda: len(query.begun) == 4)
            asked.append(tasks.create_task(ask(one, 100)))
            await until(lambda: f"address {ONE}" in server.app.site.query._reads._clients)
            query.allow()
            await until(lambda: len(query.begun) == 5)
            assert query.begun[4] == 100
            query.allow(100)
        assert {task.result() for task in asked} == {200}


async def test_the_same_query_of_many_is_asked_once(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.fill(10)
    async with run_server() as server, httpx.AsyncClient(timeout=PATIENCE_SECONDS) as client:
        query = Held(monkeypatch, server, "query", 1)
        asked = [
            asyncio.create_task(client.get(server.url + QUERY, params={"uriPatterns": "*"}))
            for _ in range(10)
        ]
        reads = server.app.site.query._reads
        await until(lambda: sum(sum(read.askers.values()) for read in reads._reads.values()) == 10)
        assert list(reads._clients) == [f"address {ONE}"]
        query.allow()
        answers = await asyncio.gather(*asked)
    assert query.begun == [0]
    labels = [event["labels"][0] for event in database.stored()]
    assert all(answer.json() == {"labels": labels} for answer in answers)


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.9", "address 203.0.113.9"),
        ("2001:db8::7", "address 2001:db8::/64"),
        ("203.0.113.9, 127.0.0.3", "address 203.0.113.9"),
        # A proxy that says nothing of whom it stands for is one client, and not exempt.
        (None, "address 127.0.0.1"),
    ],
)
async def test_behind_a_trusted_proxy_the_client_is_the_one_it_forwards(
    run_server: RunServer, database: TestDatabase, forwarded: str | None, client: str
) -> None:
    database.insert(3)
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    async with (
        run_server(trusted_proxies=(ip_network("127.0.0.0/8"),)) as server,
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{server.stream_url}?cursor=0&expired=2020-01-01T00:00:00Z"),
        session.get(f"{server.url}{QUERY}?uriPatterns=*") as answer,
    ):
        assert answer.status == 200
        app = server.app
        for reads in (app.feed.pages._reads, app.site.query._reads, app.expiry._reads):
            await until(lambda reads=reads: list(reads._clients) == [client])


async def test_with_a_token_the_client_is_its_subject_wherever_it_comes_from(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(3)
    claims = {"iat": time.time(), "exp": time.time() + 60}
    async with run_server(jwt_secret=SECRET) as server:
        for subject, client in (("alice", "subject alice"), (None, f"address {ONE}")):
            named = claims if subject is None else {**claims, "sub": subject}
            headers = {"Authorization": f"Bearer {jwt.encode(named, SECRET, 'HS256')}"}
            async with aiohttp.ClientSession(headers=headers) as session:
                async with session.get(f"{server.stream_url}?cursor=0") as stream:
                    assert stream.status == 200
                    await until(
                        lambda client=client: client in server.app.feed.pages._reads._clients
                    )
                async with session.get(f"{server.url}{QUERY}?uriPatterns=*") as answer:
                    assert answer.status == 200
                    assert client in server.app.site.query._reads._clients


async def test_pages_cut_out_of_the_ring_have_their_turn_too(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(page_max_events=10) as server, AsyncExitStack() as stack:
        database.fill(100)
        await until(lambda: server.app.feed.sequencer.head == 100)
        assert server.app.feed.sequencer.ring.covers(0)
        one = await stack.enter_async_context(coming_from(ONE))
        many = await stack.enter_async_context(coming_from(MANY))
        for session in (one, many):
            for value in ("spam", "porn"):
                url = f"{server.stream_url}?cursor=0&values={value}"
                await stack.enter_async_context(session.get(url))
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(100)
        assert reader.events == database.stored()
        assert server.app.metrics.count["backfill_pages"] == 0
