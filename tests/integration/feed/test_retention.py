"""Old labels leave; readers are told; writers and running backfills are not disturbed."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.database.connection import Connection
from sse_labels.errors import ConfigError, DatabaseUnavailable
from sse_labels.feed.pages import Pages
from sse_labels.feed.store import Page, Store, TableState

from support.database import TestDatabase, insert_with, until
from support.reading import reading
from support.server import Gate, RunServer, Server


async def sweep(server: Server, **horizon: Any) -> None:
    """One round of deleting, on the running server, with this horizon."""
    retention = server.app.feed.retention
    retention._max_labels = horizon.get("max_labels")
    retention._max_age_seconds = horizon.get("max_age_seconds")
    # The server's own first round may still be at it: then this one is not the one that deletes.
    swept = await retention.sweep()
    while not swept:
        swept = await retention.sweep()


async def at_head(server: Server, seq: int) -> None:
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_seq(seq)


async def test_labels_beyond_the_newest_so_many_are_deleted(
    server: Server, database: TestDatabase
) -> None:
    database.fill(100)
    await at_head(server, 100)
    await sweep(server, max_labels=30)
    assert [event["seq"] for event in database.stored()] == list(range(71, 101))
    assert database.execute("SELECT floor FROM label_stream") == [(71,)]
    assert server.app.metrics.count["labels_deleted"] == 70


async def test_count_horizon_counts_labels_and_not_seqs(
    server: Server, database: TestDatabase
) -> None:
    database.fill(10)
    database.execute("SELECT setval('label_id_seq', 1000)")
    database.fill(10)
    await at_head(server, 1010)
    await sweep(server, max_labels=15)
    assert len(database.stored()) == 15


async def test_labels_older_than_the_age_are_deleted_and_younger_ones_stay(
    server: Server, database: TestDatabase
) -> None:
    database.fill(50)
    await at_head(server, 50)
    await sweep(server, max_age_seconds=3600)
    assert len(database.stored()) == 50
    # An hour passes: for the database, what it noted then is an hour older.
    database.execute("UPDATE label_clock SET at = at - interval '2 hours'")
    database.fill(20)
    await at_head(server, 70)
    await sweep(server, max_age_seconds=3600)
    assert [event["seq"] for event in database.stored()] == list(range(51, 71))


async def test_retention_never_passes_the_head(server: Server, database: TestDatabase) -> None:
    database.fill(10)
    await at_head(server, 10)
    late = database.connect(autocommit=False)
    cursor = late.cursor()
    insert_with(lambda sql, row: (cursor.execute(sql, row), cursor.fetchall())[1])
    database.fill(10)
    await sweep(server, max_labels=1)
    # Seq 11 is still open: 12 to 21 are not settled, and nothing of them may go.
    assert database.execute("SELECT floor FROM label_stream") == [(10,)]
    late.commit()
    async with reading(server.stream_url, cursor=9) as reader:
        await reader.until_seq(21)
    assert reader.events == database.stored()


async def test_consumer_below_the_floor_is_told_and_goes_on_from_the_floor(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(100)
    async with run_server() as server:
        await at_head(server, 100)
        await sweep(server, max_labels=40)
    # A new server: its ring does not reach back, as it would not after a day.
    async with run_server() as server, reading(server.stream_url, cursor=5) as reader:
        news = await reader.until_news("info")
        await reader.until_seq(100)
    assert (news["name"], news["floor"]) == ("OutdatedCursor", 61)
    assert reader.events == database.stored()


async def test_running_backfill_that_retention_overtakes_is_told_and_skips_nothing_else(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.fill(100)
    before = database.stored()
    asked, go = asyncio.Event(), asyncio.Event()
    read = Pages.read

    async def gated(self: Pages, client: str, cursor: int, *more: Any) -> Page:
        if cursor == 20:
            asked.set()
            await go.wait()
        return await read(self, client, cursor, *more)

    monkeypatch.setattr(Pages, "read", gated)
    async with (
        run_server(page_max_events=10, page_cache_max_bytes=0) as server,
        reading(server.stream_url, cursor=0) as reader,
    ):
        await reader.until_seq(20)
        await asked.wait()
        await sweep(server, max_labels=30)
        go.set()
        await reader.until_seq(100)
    assert [name for name, _ in reader.news] == ["info"]
    assert reader.news[0][1]["floor"] == 71
    assert reader.events == before[:20] + database.stored()


async def test_labels_that_are_gone_leave_the_ring_too(
    server: Server, database: TestDatabase
) -> None:
    database.fill(300)
    await at_head(server, 300)
    async with reading(server.stream_url) as live:
        await sweep(server, max_labels=100)
        assert server.app.feed.sequencer.ring.start == 200
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(300)
        [after] = database.insert(1)
        await live.until_seq(after)
    assert [news["floor"] for _, news in reader.news] == [201]
    assert reader.events == database.stored()[:-1]
    # Who is live goes on and is told nothing.
    assert (live.news, live.events) == ([], database.stored(300))


async def test_servers_that_do_not_delete_hear_of_the_floor(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(retention_sweep_seconds=3600) as other, run_server() as deleting:
        await other.app.feed.listener.listening.wait()
        database.fill(300)
        await at_head(other, 300)
        await at_head(deleting, 300)
        await sweep(deleting, max_labels=100)
        await until(lambda: other.app.feed.sequencer.floor == 201)
        async with reading(other.stream_url, cursor=0) as reader:
            await reader.until_seq(300)
    assert [news["floor"] for _, news in reader.news] == [201]
    assert reader.events == database.stored()


@pytest.mark.parametrize("listens", [False, True])
async def test_floor_that_was_raised_by_hand_is_noticed_by_the_next_sweep_or_notification(
    run_server: RunServer, database: TestDatabase, listens: bool
) -> None:
    async with run_server(retention_sweep_seconds=3600 if listens else 0.05) as server:
        await server.app.feed.listener.listening.wait()
        database.fill(30)
        await at_head(server, 30)
        database.execute("UPDATE label_stream SET floor = 11")
        if listens:
            database.execute("NOTIFY label_channel, 'floor'")
        await until(lambda: server.app.feed.sequencer.floor == 11)
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(30)
    assert [news["floor"] for _, news in reader.news] == [11]
    assert [event["seq"] for event in reader.events] == list(range(11, 31))


async def test_floor_that_was_raised_while_nobody_listened_is_noticed_then(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(retention_sweep_seconds=3600) as server:
        await server.app.feed.listener.listening.wait()
        database.fill(30)
        await at_head(server, 30)
        database.execute("UPDATE label_stream SET floor = 11")
        database.terminate(database.backends("LISTEN|^SELECT 1"))
        await until(lambda: server.app.feed.sequencer.floor == 11)


async def test_nothing_below_the_floor_is_served_while_its_rows_are_there(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(100)
    async with run_server(page_max_events=10) as server:
        # Its pages are kept, and so is a snapshot.
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(100)
        async with reading(server.stream_url, snapshot="active") as reader:
            await reader.until_news("info")
        # As a sweep leaves it that was killed.
        database.execute("UPDATE label_stream SET floor = 61")
        await server.app.feed.sequencer.read_state()
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(100)
        async with reading(server.stream_url, snapshot="active") as new:
            complete = await new.until_news("info")
    # And one that starts now.
    async with run_server() as server, reading(server.stream_url, cursor=0) as later:
        await later.until_seq(100)
    assert len(database.stored()) == 100
    for told in (reader, later):
        assert [news["floor"] for _, news in told.news] == [61]
        assert told.events == database.stored(60)
    assert (complete["name"], complete["seq"]) == ("SnapshotComplete", 100)
    assert {event["seq"] for event in new.events} == {
        event["seq"] for event in database.stored(60) if not event["labels"][0].get("neg")
    }


@pytest.mark.parametrize("pattern", ["*", "at://*", f"at://did:plc:{'b' * 23}3/*"])
async def test_no_query_finds_what_is_below_the_floor_while_its_rows_are_there(
    run_server: RunServer, database: TestDatabase, pattern: str
) -> None:
    database.fill(20)
    # As a sweep leaves it that was killed.
    database.execute("UPDATE label_stream SET floor = 11")
    async with run_server() as server, httpx.AsyncClient(base_url=server.url, verify=False) as http:
        path = "/xrpc/com.atproto.label.queryLabels"
        answer = await http.get(path, params={"uriPatterns": [pattern, "at://nobody"]})
    kept = [event["labels"][0] for event in database.stored(10)]
    begin = pattern.removesuffix("*")
    assert answer.json() == {"labels": [each for each in kept if each["uri"].startswith(begin)]}
    assert len(database.stored()) == 20


async def test_no_expiry_below_the_floor_is_told_while_its_rows_are_there(
    run_server: RunServer, database: TestDatabase
) -> None:
    for number in range(20):
        database.insert(1, uri=f"at://a/{number}", exp="2026-01-01T00:00:00Z")
    # As a sweep leaves it that was killed.
    database.execute("UPDATE label_stream SET floor = 11")
    async with (
        run_server() as server,
        reading(server.stream_url, cursor=20, expired="2025-01-01T00:00:00Z") as reader,
    ):
        await reader.until(lambda: bool(reader.news) and reader.news[-1][1]["seq"] == 20)
    assert [news["seq"] for _, news in reader.news] == list(range(11, 21))
    assert len(database.stored()) == 20


async def test_new_consumers_share_no_snapshot_of_before_the_floor(
    server: Server, database: TestDatabase
) -> None:
    database.fill(20)
    await at_head(server, 20)
    async with reading(server.stream_url, snapshot="active") as reader:
        await reader.until_news("info")
    database.fill(20)
    await at_head(server, 40)
    await sweep(server, max_labels=10)
    async with reading(server.stream_url, snapshot="active") as reader:
        complete = await reader.until_news("info")
    assert (complete["name"], complete["seq"]) == ("SnapshotComplete", 40)
    assert [event["seq"] for event in reader.events] == [
        event["seq"] for event in database.stored() if not event["labels"][0].get("neg")
    ]


@pytest.mark.parametrize("in_ring", [False, True])
@pytest.mark.parametrize("query", [{}, {"values": "rude"}, {"values": "nobody"}])
async def test_number_is_the_first_seq_that_follows(
    run_server: RunServer, database: TestDatabase, in_ring: bool, query: dict[str, str]
) -> None:
    database.fill(10)
    async with run_server() as server:
        if not in_ring:
            database.execute("SELECT setval('label_id_seq', 100)")
            database.fill(10)
            await at_head(server, 110)
    async with run_server() as server:
        if in_ring:
            database.execute("SELECT setval('label_id_seq', 100)")
            database.fill(10)
            await at_head(server, 110)
        database.execute("UPDATE label_stream SET floor = 50")
        await server.app.feed.sequencer.read_state()
        async with reading(server.stream_url, cursor=5, **query) as below:
            await below.until_seq(110)
        # Of what comes after 49 nothing is gone.
        async with reading(server.stream_url, cursor=49, **query) as above:
            await above.until_seq(110)
    # Where a filter hides the last label, the end of history is told too.
    [news] = [news for _, news in below.news if news["name"] != "CaughtUp"]
    assert (news["name"], news["floor"]) == ("OutdatedCursor", 101)
    assert "going on from seq 101" in news["message"]
    assert {news["name"] for _, news in above.news} <= {"CaughtUp"}
    assert above.events == below.events


async def test_looking_for_a_floor_costs_no_query_while_all_is_quiet(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_server(poll_seconds=0.01, retention_sweep_seconds=3600) as server:
        await server.app.feed.listener.listening.wait()
        database.fill(10)
        await at_head(server, 10)
        store, asked = server.app.feed.store, []
        rows_after = store.rows_after

        async def counted(*arguments: Any) -> Any:
            asked.append("rows")
            return await rows_after(*arguments)

        async def state() -> TableState:
            asked.append("state")
            return await Store.state(store)

        monkeypatch.setattr(store, "state", state)
        monkeypatch.setattr(store, "rows_after", counted)
        database.insert(5)
        await until(lambda: len(asked) >= 30)
    assert set(asked) == {"rows"}


async def test_deleting_does_not_wait_for_or_block_writers(
    server: Server, database: TestDatabase
) -> None:
    database.fill(5000)
    await at_head(server, 5000)
    # A writer with an open transaction: deleting must end while it is open.
    writer = database.connect(autocommit=False)
    cursor = writer.cursor()
    insert_with(lambda sql, row: (cursor.execute(sql, row), cursor.fetchall())[1])
    async with asyncio.timeout(20):
        await sweep(server, max_labels=1000)
    writer.commit()
    assert len(database.stored()) == 1001


async def test_only_one_server_deletes_at_a_time(server: Server, database: TestDatabase) -> None:
    database.fill(10)
    await at_head(server, 10)
    other = database.connect()
    lock = "SELECT pg_advisory_lock(hashtext('sse-labels retention'))"
    # In a thread: the server's own first round may hold it, and needs this loop to let it go.
    await asyncio.to_thread(other.cursor().execute, lock)
    server.app.feed.retention._max_labels = 1
    assert not await server.app.feed.retention.sweep()
    assert len(database.stored()) == 10
    other.cursor().execute("SELECT pg_advisory_unlock_all()")
    await sweep(server, max_labels=1)
    assert len(database.stored()) == 1


async def test_seqs_go_on_when_all_labels_but_one_are_gone(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(10)
    async with run_server() as server:
        await at_head(server, 10)
        await sweep(server, max_labels=1)
    async with run_server() as server, reading(server.stream_url, last_event_id="10") as reader:
        assert database.insert() == [11]
        await reader.until_seq(11)
    assert reader.events == database.stored(after=10)


async def test_horizon_that_the_role_may_not_keep_is_a_config_error(
    database: TestDatabase,
) -> None:
    database.execute("DROP TABLE label_stream CASCADE")
    app = App(Settings(port=0, migrate=False, retention_max_labels=10), database.dsn, None)
    with pytest.raises(ConfigError, match="--retention-max-labels"):
        async with app.running():
            pass


async def test_live_reader_of_a_server_that_lags_is_told_what_another_deleted(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        run_server(heartbeat_seconds=0.1) as lagging,
        run_server() as other,
        reading(lagging.stream_url) as live,
        reading(lagging.stream_url, values="never") as hidden,
    ):
        database.insert(1)
        await live.until_events(1)
        await hidden.until_seq(1)
        gate = Gate()
        store = lagging.app.feed.store
        monkeypatch.setattr(store, "rows_after", gate.before(store.rows_after))
        await gate.reached.wait()
        database.fill(100)
        await at_head(other, 101)
        await sweep(other, max_labels=10)
        gate.opened.set()
        await live.until_seq(101)
        await hidden.until_seq(101)
        [after] = database.insert(1)
        await live.until_seq(after)
    assert live.events[1:] == database.stored()
    for reader in (live, hidden):
        [(kind, news)] = reader.news
        assert (kind, news["name"], news["floor"]) == ("info", "OutdatedCursor", 92)


async def test_nothing_is_deleted_without_a_horizon(server: Server, database: TestDatabase) -> None:
    database.fill(20)
    await at_head(server, 20)
    # As a server left it that was killed between raising the floor and deleting.
    database.execute("UPDATE label_stream SET floor = 15")
    await server.app.feed.retention.sweep()
    assert len(database.stored()) == 20


async def test_age_of_the_last_complete_sweep_is_shown(
    server: Server, database: TestDatabase
) -> None:
    retention = server.app.feed.retention
    shown = server.app.metrics.gauges["sweep_age_seconds"]
    # A whole number: sums with the machine's clock are rounded.
    now = retention._swept = 1000.0
    retention._clock = lambda: now
    database.fill(10)
    await at_head(server, 10)
    now += 1000
    # Nothing is to be deleted: nothing is late.
    assert shown() == 0
    # From here on the server's own first round cannot be the one that sweeps.
    other = database.connect()
    lock = "SELECT pg_advisory_lock(hashtext('sse-labels retention'))"
    await asyncio.to_thread(other.cursor().execute, lock)
    retention._max_labels = 5
    assert shown() == 1000
    assert not await retention.sweep()
    assert shown() == 1000
    other.cursor().execute("SELECT pg_advisory_unlock_all()")
    await sweep(server, max_labels=5)
    assert shown() == 0
    now += 60
    assert shown() == 60


async def test_sweep_that_fails_half_way_is_none(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    retention = server.app.feed.retention
    now = retention._swept
    database.fill(10)
    await at_head(server, 10)
    await sweep(server, max_labels=9)
    retention._clock = lambda: now
    now = retention._swept + 100

    fetch = Connection.fetch

    async def lost(connection: Connection, name: str, **arguments: Any) -> Any:
        if name == "delete_below_floor":
            raise DatabaseUnavailable("gone")
        return await fetch(connection, name, **arguments)

    monkeypatch.setattr(Connection, "fetch", lost)
    with pytest.raises(DatabaseUnavailable):
        await sweep(server, max_labels=5)
    assert retention.sweep_age_seconds() == pytest.approx(100)
