"""`snapshot=active`: what is in force, and then every event after it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import aiohttp
import pytest

from sse_labels import xrpc

from support.database import TestDatabase, role, until
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
    for _ in range(count):
        database.insert(
            1,
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
    await until(lambda: server.app.sequencer.head == 40)
    async with reading(server.stream_url, snapshot="active") as stream:
        assert (await until_complete(stream))["seq"] == 40
        assert int(stream.last_id) == 40
        wanted = folded(database.stored())
        assert stream.events == sorted(wanted.values(), key=lambda event: event["seq"])
        write(database, random.Random(2), 10)
        await stream.until_seq(50)
        assert stream.events[len(wanted) :] == database.stored(40)


@pytest.mark.parametrize("seed", range(8))
async def test_a_consumer_that_is_cut_anywhere_ends_with_the_state_of_the_table(
    run_server: RunServer, database: TestDatabase, seed: int
) -> None:
    chance = random.Random(seed)
    async with run_server(page_max_events=1) as server:
        write(database, chance, 30)
        await until(lambda: server.app.sequencer.head == 30)
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
        await until(lambda head=head: server.app.sequencer.head == head)
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
        await until(lambda: server.app.sequencer.head == 200)
        async with reading(server.stream_url, snapshot="active") as stream:
            assert (await until_complete(stream))["seq"] == 200
            assert stream.events == []


async def test_a_filter_narrows_the_snapshot(server: Server, database: TestDatabase) -> None:
    write(database, random.Random(5), 40)
    await until(lambda: server.app.sequencer.head == 40)
    async with reading(server.stream_url, snapshot="active", values="rude") as stream:
        await until_complete(stream)
    wanted = [e for e in folded(database.stored()).values() if e["labels"][0]["val"] == "rude"]
    assert stream.events == sorted(wanted, key=lambda event: event["seq"])


async def test_a_new_consumer_is_not_told_of_the_floor_and_one_that_comes_back_is(
    server: Server, database: TestDatabase
) -> None:
    database.fill(10)
    await until(lambda: server.app.sequencer.head == 10)
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
    await until(lambda: server.app.sequencer.head == 40)
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
    with role(database, "SELECT ON label") as dsn:
        async with (
            run_server(dsn, migrate=False) as server,
            reading(server.stream_url, snapshot="active") as stream,
        ):
            await until_complete(stream)
    assert folded(stream.events) == folded(database.stored())


async def test_what_expires_between_two_snapshots_of_the_same_seq_is_not_in_the_second(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    over: set[str | None] = set()
    monkeypatch.setattr("sse_labels.store.is_expired", lambda exp, _: exp in over)
    database.insert(1, exp=FUTURE)
    database.insert(25, val="rude")
    async with run_server(page_max_events=1) as server:
        for left in (26, 25):
            async with reading(server.stream_url, snapshot="active") as stream:
                assert (await until_complete(stream))["seq"] == 26
                assert stream.events == database.stored()[-left:]
            over.add(FUTURE)


async def test_an_unknown_snapshot_is_refused_by_name(server: Server) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.stream_url}?snapshot=all") as answer,
    ):
        assert answer.status == 400
        assert "snapshot: got 'all', expected 'active'" in (await answer.json())["message"]


@pytest.mark.parametrize("pattern", ["*", f"at://did:plc:{'b' * 24}/app.bsky.feed.post/1", "at:*"])
async def test_query_labels_leaves_out_what_is_over_and_reaches_each_match_once(
    server: Server, database: TestDatabase, pattern: str
) -> None:
    write(database, random.Random(8), 60)
    await until(lambda: server.app.sequencer.head == 60)
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
