"""How the sequencer and the listener follow a database that notifies, goes away and comes back.

NOTIFY is only a hint and the table is the truth: whatever is lost, nothing in the table is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from sse_labels.errors import BrokenPromise

from support.database import TestDatabase, insert_with, until
from support.reading import PATIENCE_SECONDS, Reader, reading
from support.server import RunServer, Server

LISTENER = "^(LISTEN|SELECT 1$)"
#: What the sequencer's own connection ran last, whatever it was.
SEQUENCER = r"FROM label\s+WHERE id > \d+\s+ORDER BY id|FROM pg_locks|pg_xact_commit_timestamp"
#: No timer of the service fires during a test: only notifications wake it.
NEVER = {"poll_seconds": 3600}


@contextmanager
def no_new_connections(database: TestDatabase) -> Iterator[None]:
    """Inside the block the database keeps its connections and accepts no other."""
    admin = psycopg2.connect(make_dsn(database.dsn, dbname="postgres"))
    admin.autocommit = True
    cursor = admin.cursor()
    cursor.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
    try:
        yield
    finally:
        cursor.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
        admin.close()


@contextmanager
def writing(database: TestDatabase) -> Iterator[Any]:
    """A function that inserts labels through a connection that is open already."""
    cursor = database.connect().cursor()

    def insert(count: int) -> None:
        def execute(sql: str, parameters: Any) -> Any:
            cursor.execute(sql, parameters)
            return cursor.fetchall()

        for number in range(count):
            insert_with(execute, number)

    yield insert


def reconnects(server: Server) -> int:
    return server.app.metrics.count["database_reconnects"]


def following_again(server: Server) -> bool:
    """Whether sequencer and listener have both been replaced; each may have needed two tries."""
    following = server.app.feed.sequencer.following and server.app.feed.listener.listening.is_set()
    return following and reconnects(server) >= 2


async def ready(server: Server) -> bool:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{server.url}/health/ready")).status_code == 200


class TestNotifications:
    async def test_a_notification_wakes_the_sequencer(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        async with (
            run_server(**NEVER) as server,
            reading(server.stream_url, cursor=0) as reader,
        ):
            for count in range(1, 6):
                database.insert()
                await reader.until_events(count)
            assert reader.events == database.stored()

    async def test_labels_arrive_by_polling_without_any_notification(
        self, server: Server, database: TestDatabase
    ) -> None:
        database.execute("DROP TRIGGER label_notify ON label")
        async with reading(server.stream_url, cursor=0) as reader:
            for count in range(1, 4):
                database.insert()
                await reader.until_events(count)
        assert reader.events == database.stored()

    async def test_a_notification_without_a_label_changes_nothing(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        async with (
            run_server(**NEVER) as server,
            reading(server.stream_url, cursor=0) as reader,
        ):
            for _ in range(20):
                database.execute("NOTIFY label_channel, 'nothing'")
            database.insert()
            await reader.until_events(1)
            assert reader.events == database.stored()


class TestLostConnections:
    async def test_the_listener_listens_again_and_nothing_is_lost(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        async with (
            run_server(**NEVER) as server,
            reading(server.stream_url, cursor=0) as reader,
        ):
            database.insert()
            await reader.until_events(1)
            with writing(database) as insert:
                listener = await until(lambda: database.backends(LISTENER))
                with no_new_connections(database):
                    terminate(database, listener)
                    await until(lambda: not server.app.feed.listener.listening.is_set())
                    assert not await ready(server)
                    # Committed while nobody listens: this notification reaches no one.
                    insert(3)
                # After it listens again it looks at the table: no other wake comes.
                await reader.until_events(4)
            await until(server.app.feed.listener.listening.is_set)
            assert database.backends(LISTENER) != listener
            assert reconnects(server) == 1
            database.insert()
            await reader.until_events(5)
            assert await ready(server)
            assert reader.events == database.stored()

    async def test_the_sequencer_connects_again_and_nothing_is_lost(
        self, server: Server, database: TestDatabase
    ) -> None:
        async with reading(server.stream_url, cursor=0) as reader:
            database.insert()
            await reader.until_events(1)
            with writing(database) as insert:
                sequencer = await until(lambda: database.backends(SEQUENCER))
                with no_new_connections(database):
                    terminate(database, sequencer)
                    await until(lambda: not server.app.feed.sequencer.following)
                    assert not await ready(server)
                    insert(3)
                await reader.until_events(4)
            assert reconnects(server) >= 1
            assert await ready(server)
        assert reader.events == database.stored()

    async def test_all_connections_are_made_again_and_nothing_is_lost(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.fill(50)
        # No ring: the history that a new reader asks for comes through the pool.
        async with run_server(ring_max_bytes=0, page_max_events=20) as server:
            async with reading(server.stream_url, cursor=0) as reader:
                await reader.until_events(50)
                with writing(database) as insert:
                    all_of_them = database.backends()
                    assert len(all_of_them) >= 3
                    with no_new_connections(database):
                        terminate(database, all_of_them)
                        await until(lambda: not server.app.feed.sequencer.following)
                        await until(lambda: not server.app.feed.listener.listening.is_set())
                        insert(3)
                    await reader.until_events(53)
                await until(lambda: following_again(server))
                assert reader.events == database.stored()
            async with reading(server.stream_url, cursor=0) as again:
                await again.until_events(53)
            assert again.events == database.stored()

    async def test_a_connection_lost_while_a_hole_is_open_loses_nothing(
        self, server: Server, database: TestDatabase
    ) -> None:
        hole = database.connect(autocommit=False)
        with hole.cursor() as cursor:
            cursor.execute("SELECT nextval('label_id_seq')")
            database.insert(2)
            async with reading(server.stream_url, cursor=0) as reader:
                await until(server.app.metrics.gauges["holes_open"])
                database.terminate(database.backends())
                await until(lambda: following_again(server))
                assert server.app.metrics.gauges["holes_open"]()
                assert server.app.feed.sequencer.head == 0
                cursor.execute(
                    "INSERT INTO label (id, src, uri, cid, val, cts)"
                    " VALUES (1, 'did:plc:a', 'at://did:plc:b', '', 'spam', '2026-01-01T00:00:00Z')"
                )
                hole.commit()
                await reader.until_events(3)
        assert reader.events == database.stored()

    async def test_a_statement_timeout_does_not_end_the_server(
        self, server: Server, database: TestDatabase
    ) -> None:
        async with reading(server.stream_url, cursor=0) as reader:
            database.insert()
            await reader.until_events(1)
            database.execute(f"ALTER DATABASE {database.name} SET statement_timeout = '200ms'")
            # The setting is for new sessions, but not for those of the test.
            database = replace(
                database, dsn=make_dsn(database.dsn, options="-c statement_timeout=0")
            )
            database.terminate(database.backends())
            await until(lambda: following_again(server))
            writer = database.connect(autocommit=False)
            with writer.cursor() as cursor:
                cursor.execute("LOCK TABLE label IN ACCESS EXCLUSIVE MODE")
                await until(lambda: not server.app.feed.sequencer.following)
                insert_with(lambda sql, row: (cursor.execute(sql, row), cursor.fetchall())[1])
            writer.commit()
            await reader.until_events(2)
            assert server.app.feed.sequencer.following
        assert reader.events == database.stored()


def terminate(database: TestDatabase, pids: list[int]) -> None:
    """End sessions from outside: this database may accept nobody."""
    outside = TestDatabase(make_dsn(database.dsn, dbname="postgres"), "postgres")
    outside.terminate(pids)


class TestADatabaseThatWentBack:
    async def test_is_a_broken_promise_and_ends_the_server(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.insert(5)
        stored = database.stored()
        received: list[asyncio.Task[Reader]] = []
        with pytest.raises(BaseExceptionGroup) as caught:
            async with run_server() as server:
                received.append(asyncio.create_task(read_to_the_end(server.stream_url)))
                metrics = server.app.metrics
                await until(lambda: metrics.events_delivered == 5)
                go_back(database, to=2)
                database.terminate(database.backends(SEQUENCER))
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asyncio.Event().wait()
        assert caught.group_contains(BrokenPromise, match="went back")
        assert metrics.count["broken_promises"] == 1
        # The stream is ended too, and not in silence.
        reader = await received[0]
        assert [name for name, _ in reader.news] == ["error"]
        assert reader.events == stored

    async def test_is_noticed_although_other_labels_were_made_since(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.insert(5)
        with pytest.raises(BaseExceptionGroup) as caught:
            async with run_server():
                go_back(database, to=2)
                database.insert(2)
                database.terminate(database.backends(SEQUENCER))
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asyncio.Event().wait()
        assert caught.group_contains(BrokenPromise, match="is 4 in .*, 5 has been streamed")

    async def test_a_database_that_did_not_is_followed_on(
        self, server: Server, database: TestDatabase
    ) -> None:
        # The same seqs were given up for good: retention took them, and the sequence knows them.
        database.insert(5)
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_events(5)
            database.execute("UPDATE label_stream SET floor = 6")
            database.execute("DELETE FROM label")
            database.terminate(database.backends())
            await until(lambda: following_again(server))
            database.insert(2)
            await reader.until_events(7)
        assert reader.events[5:] == database.stored()


async def read_to_the_end(url: str) -> Reader:
    async with reading(url, cursor=0) as reader:
        await reader.until_closed()
    return reader


def go_back(database: TestDatabase, *, to: int) -> None:
    """Make the database what an older backup of it is."""
    database.execute("DROP TRIGGER label_refuse_delete ON label")
    database.execute("DELETE FROM label WHERE id > %s", (to,))
    database.execute("SELECT setval('label_id_seq', %s)", (to,))


class TestHead:
    async def test_holes_that_are_final_move_the_head(
        self, server: Server, database: TestDatabase
    ) -> None:
        database.insert()
        lost = database.connect(autocommit=False)
        with lost.cursor() as cursor:
            cursor.execute("SELECT nextval('label_id_seq') FROM generate_series(1, 5)")
        lost.rollback()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_seq(7)
        assert server.app.feed.sequencer.head == 7
        assert reader.events == database.stored()

    async def test_a_hole_that_ends_what_was_seen_moves_the_head_over_it(
        self, server: Server, database: TestDatabase
    ) -> None:
        hole = database.connect(autocommit=False)
        with hole.cursor() as cursor:
            cursor.execute("SELECT nextval('label_id_seq')")
            database.insert(3)
            await until(server.app.metrics.gauges["holes_open"])
            # What was seen above the hole goes, by retention, before the hole is final.
            database.execute("UPDATE label_stream SET floor = 5")
            database.execute("DELETE FROM label")
            hole.rollback()
        await until(lambda: server.app.feed.sequencer.head == 4)
        async with reading(server.stream_url, last_event_id="4") as reader:
            database.insert()
            await reader.until_events(1)
        assert reader.events == database.stored()

    async def test_ids_given_up_before_the_start_lie_below_the_head(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.insert(2)
        database.execute("SELECT nextval('label_id_seq') FROM generate_series(1, 5)")
        async with run_server() as server:
            assert server.app.feed.sequencer.head == 7
            async with reading(server.stream_url, cursor=0) as reader:
                await reader.until_events(2)
                database.insert()
                await reader.until_events(3)
            assert reader.events == database.stored()


async def test_commit_to_fanout_is_sampled(server: Server, database: TestDatabase) -> None:
    histogram = server.app.metrics.fanout_seconds

    def samples() -> dict[str, float]:
        return {s.name + s.labels.get("le", ""): s.value for s in histogram.collect()[0].samples}

    name = "sse_labels_commit_to_fanout_seconds"
    assert samples()[f"{name}_count"] == 0
    async with reading(server.stream_url, cursor=0) as reader:
        database.insert()
        await reader.until_events(1)
    await until(lambda: samples()[f"{name}_count"] == 1)
    # From a commit that was just made to its hand-over: no more than this test could wait.
    assert 0 <= samples()[f"{name}_sum"] < PATIENCE_SECONDS
    async with httpx.AsyncClient() as client:
        assert f"{name}_count 1.0" in (await client.get(f"{server.url}/metrics")).text
    assert reader.events == database.stored()
