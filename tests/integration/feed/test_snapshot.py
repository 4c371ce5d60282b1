"""`snapshot=active`: what is in force, and then every event after it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from sse_labels.feed.store import Snapshot
from sse_labels.protocol import xrpc

from support.database import TestDatabase, insert_with, role, until
from support.reading import Reader, reading
from support.server import RunServer, Server

Key = tuple[str, str, str, str]
PAST, FUTURE = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00+00:00"


def key_of(label: dict[str, Any]) -> Key:
    return label["src"], label["uri"], label.get("cid", ""), label["val"]


def folded(events: Iterable[dict[str, Any]], start: dict[Key, Any] | None = None) -> dict[Key, Any]:
    """What a consumer believes to be in force: the newest event of each key, unless it is over."""
    state = dict(start or {})
    for event in events:
        [label] = event["labels"]
        over = label.get("neg") or label.get("exp") == PAST
        state.pop(key_of(label), None)
        if not over:
            state[key_of(label)] = event
    return state


def write(database: TestDatabase, chance: random.Random, count: int) -> None:
    with database.session() as execute:
        for _ in range(count):
            insert_with(
                execute,
                uri=f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{chance.randrange(4)}",
                val=chance.choice(["spam", "rude"]),
                neg=chance.random() < 0.3,
                exp=chance.choice([None, None, FUTURE, PAST]),
            )


async def until_complete(stream: Reader) -> dict[str, Any]:
    news = await stream.until_news("info")
    assert news["name"] == "SnapshotComplete"
    return news


async def test_a_new_consumer_gets_what_is_in_force_and_then_goes_on_live(
    server: Server, database: TestDatabase
) -> None:
    write(database, random.Random(1), 40)
    await until(lambda: server.app.feed.sequencer.head == 40)
    async with reading(server.stream_url, snapshot="active") as stream:
        assert (await until_complete(stream))["seq"] == 40
        assert int(stream.last_id) == 40
        wanted = folded(database.stored())
        assert stream.events == sorted(wanted.values(), key=lambda event: event["seq"])
        write(database, random.Random(2), 10)
        await stream.until_seq(50)
        assert stream.events[len(wanted) :] == database.stored(40)


@pytest.mark.parametrize("seed", range(4))
async def test_a_consumer_that_is_cut_anywhere_ends_with_the_state_of_the_table(
    run_server: RunServer, database: TestDatabase, seed: int
) -> None:
    chance = random.Random(seed)
    async with run_server(page_max_events=1) as server:
        write(database, chance, 30)
        await until(lambda: server.app.feed.sequencer.head == 30)
        url = f"{server.stream_url}?snapshot=active"
        received: list[dict[str, Any]] = []
        last_id, head = None, 30
        for _ in range(6):
            # Cut in the midst, while labels are taken back and given again.
            async with reading(url, last_event_id=last_id) as stream:
                enough = chance.randrange(1, 4)
                await stream.until(
                    lambda stream=stream, enough=enough, head=head: (
                        len(stream.events) >= enough or int(stream.last_id or 0) == head
                    )
                )
                received += stream.events
                last_id = stream.last_id
            write(database, chance, 5)
            head += 5
        await until(lambda head=head: server.app.feed.sequencer.head == head)
        async with reading(url, last_event_id=last_id) as stream:
            await stream.until_seq(head)
            received += stream.events
        assert folded(received) == folded(database.stored())
        seqs = [event["seq"] for event in received]
        assert seqs == sorted(set(seqs))


async def test_labels_that_are_written_during_a_snapshot_come_after_it(
    run_server: RunServer, database: TestDatabase
) -> None:
    write(database, random.Random(3), 30)
    async with run_server(page_max_events=1, send_buffer_bytes=4096) as server:
        async with reading(server.stream_url, snapshot="active") as stream:
            await stream.until_opened()
            write(database, random.Random(4), 30)
            await stream.until_seq(60)
            complete = await until_complete(stream)
        at = complete["seq"]
        before = [event for event in stream.events if event["seq"] <= at]
        stored = database.stored()
        assert folded(before) == folded(event for event in stored if event["seq"] <= at)
        assert stream.events[len(before) :] == [event for event in stored if event["seq"] > at]


async def test_a_snapshot_of_nothing_is_complete_at_once(server: Server) -> None:
    async with reading(server.stream_url, snapshot="active") as stream:
        assert (await until_complete(stream))["seq"] == 0
        assert stream.events == []


async def test_where_all_is_negated_the_snapshot_is_empty_however_long_history_is(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(100)
    database.execute(
        "INSERT INTO label (src, uri, cid, val, neg, cts)"
        " SELECT src, uri, cid, val, true, cts FROM label ORDER BY id"
    )
    async with run_server(page_max_events=2) as server:
        await until(lambda: server.app.feed.sequencer.head == 200)
        async with reading(server.stream_url, snapshot="active") as stream:
            assert (await until_complete(stream))["seq"] == 200
            assert stream.events == []


async def test_a_consumer_is_told_how_far_a_snapshot_is_while_it_is_empty(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.fill(100)
    database.execute(
        "INSERT INTO label (src, uri, cid, val, neg, cts)"
        " SELECT src, uri, cid, val, true, cts FROM label ORDER BY id"
    )
    async with run_server(page_max_events=2, heartbeat_seconds=0.05) as server:
        await until(lambda: server.app.feed.sequencer.head == 200)
        read, on = server.app.feed.pages.read, asyncio.Event()

        async def hold(client: str, cursor: int, *rest: Any) -> Any:
            if cursor >= 100:
                await on.wait()
            return await read(client, cursor, *rest)

        monkeypatch.setattr(server.app.feed.pages, "read", hold)
        # Else whoever is cut begins anew each time.
        async with reading(server.stream_url, snapshot="active") as stream:
            await stream.until(lambda: int(stream.last_id or 0) >= 100)
            assert stream.news == []
            on.set()
            assert (await until_complete(stream))["seq"] == 200


async def test_a_filter_narrows_the_snapshot(server: Server, database: TestDatabase) -> None:
    write(database, random.Random(5), 40)
    await until(lambda: server.app.feed.sequencer.head == 40)
    async with reading(server.stream_url, snapshot="active", values="rude") as stream:
        await until_complete(stream)
    wanted = [e for e in folded(database.stored()).values() if e["labels"][0]["val"] == "rude"]
    assert stream.events == sorted(wanted, key=lambda event: event["seq"])


async def test_a_new_consumer_is_not_told_of_the_floor_and_one_that_comes_back_is(
    server: Server, database: TestDatabase
) -> None:
    database.fill(10)
    await until(lambda: server.app.feed.sequencer.head == 10)
    database.execute("UPDATE label_stream SET floor = 6")
    database.execute("DELETE FROM label WHERE id < 6")
    url = f"{server.stream_url}?snapshot=active"
    async with reading(url) as stream:
        await until_complete(stream)
        assert folded(stream.events) == folded(database.stored())
    async with reading(url, last_event_id="2") as stream:
        await stream.until_seq(10)
        assert stream.news[0][1]["name"] == "OutdatedCursor"


async def test_the_socket_carries_the_same_snapshot(server: Server, database: TestDatabase) -> None:
    write(database, random.Random(6), 40)
    await until(lambda: server.app.feed.sequencer.head == 40)
    url = f"{server.url}/xrpc/com.atproto.label.subscribeLabels?snapshot=active"
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        seqs = []
        while (message := xrpc.decode(await socket.receive_bytes())).type == "#labels":
            seqs.append(message.body["seq"])
    assert message.type == "#info"
    assert (message.body["name"], message.body["seq"]) == ("SnapshotComplete", 40)
    assert seqs == sorted(event["seq"] for event in folded(database.stored()).values())


async def test_ozones_table_has_snapshots_too(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.execute("DROP INDEX label_key_idx")
    write(database, random.Random(7), 40)
    with role(database, "SELECT ON label, label_stream") as dsn:
        async with (
            run_server(dsn, migrate=False) as server,
            reading(server.stream_url, snapshot="active") as stream,
        ):
            await until_complete(stream)
    assert folded(stream.events) == folded(database.stored())


async def test_pages_of_a_snapshot_are_kept_until_the_first_of_their_labels_expires(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    clock = SimpleNamespace(time=lambda: now)
    monkeypatch.setattr("sse_labels.feed.store.time", clock)
    monkeypatch.setattr("sse_labels.feed.pages.time", clock)
    database.insert(1, exp=datetime.fromtimestamp(now + 100, UTC).isoformat())
    database.insert(1, val="porn", exp=FUTURE)
    database.insert(24, val="rude")
    async with run_server(page_max_events=1) as server:
        count = server.app.metrics.count
        for seconds, left, kept in ((0, 26, 0), (99, 26, 25), (2, 25, 24), (0, 25, 25)):
            now += seconds
            before = count["backfill_page_hits"]
            async with reading(server.stream_url, snapshot="active") as stream:
                assert (await until_complete(stream))["seq"] == 26
                assert stream.events == database.stored()[-left:]
            assert count["backfill_page_hits"] - before == kept


async def test_consumers_that_come_together_begin_with_the_same_state(
    run_server: RunServer, database: TestDatabase
) -> None:
    write(database, random.Random(9), 40)
    async with run_server(page_max_events=1) as server:
        count = server.app.metrics.count
        await until(lambda: server.app.feed.sequencer.head == 40)
        pages = 0
        for head, times in ((40, 0), (50, 1), (60, 2)):
            async with reading(server.stream_url, snapshot="active") as stream:
                assert (await until_complete(stream))["seq"] == 40
                await stream.until_seq(head)
            # What came since follows, once and in order.
            assert folded(stream.events) == folded(database.stored())
            seqs = [event["seq"] for event in stream.events]
            assert seqs == sorted(set(seqs))
            pages = pages or count["backfill_pages"]
            # The last page reaches to the end, and is kept by nobody.
            assert count["backfill_page_hits"] == times * (pages - 1)
            write(database, random.Random(head), 10)
            await until(lambda head=head: server.app.feed.sequencer.head == head + 10)


@pytest.mark.parametrize("bound", ["SECONDS", "EVENTS"])
async def test_a_state_that_is_not_new_enough_is_not_begun_with(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(f"sse_labels.feed.snapshots.SHARED_{bound}", 9)
    clock = server.app.expiry.clock
    for head, at in ((10, 10), (19, 10), (20, 20)):
        if bound == "SECONDS":
            monkeypatch.setattr(
                server.app.expiry, "clock", lambda head=head: clock() + (head - 10) * 0.9
            )
        write(database, random.Random(head), head - server.app.feed.sequencer.head)
        await until(lambda head=head: server.app.feed.sequencer.head == head)
        async with reading(server.stream_url, snapshot="active") as stream:
            assert (await until_complete(stream))["seq"] == at


async def test_an_unknown_snapshot_is_refused_by_name(server: Server) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.stream_url}?snapshot=all") as answer,
    ):
        assert answer.status == 400
        assert "snapshot: got 'all', expected 'active'" in (await answer.json())["message"]


#: Rows that a query looks at by ids, and by URIs: all, or so few that it has to be asked again.
WINDOWS = [(10_000, 2500), (7, 5), (1, 1)]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("pattern", ["*", f"at://did:plc:{'b' * 24}/app.bsky.feed.post/1", "at:*"])
async def test_query_labels_leaves_out_what_is_over_and_reaches_each_match_once(
    server: Server,
    database: TestDatabase,
    pattern: str,
    windows: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sse_labels.feed.store.QUERY_WINDOW", windows[0])
    monkeypatch.setattr("sse_labels.feed.store.URI_WINDOW", windows[1])
    write(database, random.Random(8), 60)
    await until(lambda: server.app.feed.sequencer.head == 60)
    url = f"{server.url}/xrpc/com.atproto.label.queryLabels"
    found: list[Any] = []
    query = {"uriPatterns": pattern, "limit": "2", "snapshot": "active"}
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(url, params=query) as answer:
                page = await answer.json()
            found += page["labels"]
            if "cursor" not in page:
                break
            query["cursor"] = page["cursor"]
    state = sorted(folded(database.stored()).values(), key=lambda event: event["seq"])
    labels = [event["labels"][0] for event in state]
    assert found == [label for label in labels if pattern.endswith("*") or label["uri"] == pattern]


async def test_a_page_of_a_snapshot_is_no_larger_than_any_other(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(100)
    async with run_server(page_max_events=10) as server:
        await until(lambda: server.app.feed.sequencer.head == 100)
        page = await server.app.feed.store.snapshot_page(0, Snapshot(100, resumed=False), 10, None)
        assert (len(page.rows), page.full) == (10, True)
        async with reading(server.stream_url, snapshot="active") as stream:
            await until_complete(stream)
    state = folded(database.stored())
    assert stream.events == sorted(state.values(), key=lambda event: event["seq"])
