"""What is settled, on a real PostgreSQL: commits in every order, and no label skipped.

Each test opens holes with transactions of its own, waits until the sequencer has looked at them,
ends them, and compares what arrived with all of the table.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import psycopg2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.embedded import EmbeddedPostgres

from support.database import (
    NOT_DURABLE,
    TestDatabase,
    insert_with,
    reachable_directory,
    role,
    until,
)
from support.reading import Reader, reading
from support.server import QUICK, RunServer, Server

#: The statements of the sequencer, as pg_stat_activity shows them.
ROWS_AFTER = r"FROM label\s+WHERE id > \d+\s+ORDER BY id"
HOLDERS = "FROM pg_locks"
#: No triggers until the transaction ends: one that notified cannot be prepared, says PostgreSQL.
UNNOTIFIED = "SET LOCAL session_replication_role = replica"


class Transaction:
    """One open transaction of a writer; what it does is said statement by statement."""

    def __init__(self, database: TestDatabase, dsn: str | None = None) -> None:
        self._cursor = database.connect(dsn).cursor()
        self.execute("BEGIN")

    def execute(self, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        self._cursor.execute(sql, parameters)
        return self._cursor.fetchall() if self._cursor.description else []

    def insert(self, count: int = 1, **columns: Any) -> list[int]:
        """Insert labels, not committed; return their seqs."""
        return [insert_with(self.execute, number, **columns) for number in range(count)]

    def commit(self) -> None:
        self.execute("COMMIT")

    def rollback(self) -> None:
        self.execute("ROLLBACK")

    def insert_unnotified(self) -> list[int]:
        """Insert a label; the transaction may be prepared, which NOTIFY would forbid."""
        self.execute(UNNOTIFIED)
        return self.insert()

    def prepare(self, gid: str) -> None:
        self.execute("PREPARE TRANSACTION %s", (gid,))


async def gauges(server: Server) -> dict[str, float]:
    """What /metrics says, by name without the prefix."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{server.url}/metrics")).text
    return {
        sample.name.removeprefix("sse_labels_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


async def until_parked(server: Server) -> None:
    """Return when the sequencer waits for a hole."""
    await until(server.app.metrics.gauges["holes_open"])


async def until_looked(database: TestDatabase) -> None:
    """Return when the sequencer has read the table, and judged it, since the call."""
    [(called,)] = database.execute("SELECT clock_timestamp()")
    # The second look that began after the call: before it, the first was judged.
    for _ in range(2):
        called = await until(lambda since=called: looked_since(database, since))


async def until_held_at(server: Server, database: TestDatabase, head: int) -> None:
    """Return when the sequencer has waited for a hole, looked again, and stands at `head`."""
    await until_parked(server)
    await until_looked(database)
    assert server.app.feed.sequencer.head == head


def looked_since(database: TestDatabase, since: Any) -> Any:
    rows = database.execute(
        "SELECT query_start FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'sse-labels' AND query ~ %s AND query_start > %s",
        (ROWS_AFTER, since),
    )
    return rows[0][0] if rows else None


def seqs(reader: Reader) -> list[int]:
    return [event["seq"] for event in reader.events]


class TestCommitsOutOfOrder:
    async def test_the_later_id_waits_for_the_earlier_commit(
        self, server: Server, database: TestDatabase
    ) -> None:
        early, late = Transaction(database), Transaction(database)
        assert (early.insert(), late.insert()) == ([1], [2])
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_opened()
            late.commit()
            await until_held_at(server, database, 0)
            early.commit()
            await reader.until_events(2)
        assert reader.events == database.stored()

    async def test_labels_before_the_hole_are_not_delayed(
        self, server: Server, database: TestDatabase
    ) -> None:
        first, early, late = (Transaction(database) for _ in range(3))
        assert (first.insert(), early.insert(), late.insert()) == ([1], [2], [3])
        late.commit()
        await until_parked(server)
        async with reading(server.stream_url, cursor=0) as reader:
            first.commit()
            await reader.until_events(1)
            assert server.app.feed.sequencer.head == 1
            early.commit()
            await reader.until_events(3)
        assert reader.events == database.stored()

    async def test_three_commits_in_reverse(self, server: Server, database: TestDatabase) -> None:
        writers = [Transaction(database) for _ in range(3)]
        for writer in writers:
            writer.insert(2)
        async with reading(server.stream_url, cursor=0) as reader:
            for writer in reversed(writers[1:]):
                writer.commit()
                await until_held_at(server, database, 0)
            writers[0].commit()
            await reader.until_events(6)
        assert reader.events == database.stored()

    async def test_a_transaction_that_interleaves_its_ids(
        self, server: Server, database: TestDatabase
    ) -> None:
        slow, quick = Transaction(database), database.insert
        taken = [slow.insert(), quick(), slow.insert(), quick(), slow.insert()]
        assert taken == [[1], [2], [3], [4], [5]]
        async with reading(server.stream_url, cursor=0) as reader:
            await until_held_at(server, database, 0)
            slow.commit()
            await reader.until_events(5)
        assert reader.events == database.stored()

    async def test_an_id_taken_long_before_its_row_is_written(
        self, server: Server, database: TestDatabase
    ) -> None:
        # No transaction id yet, nothing written: only the lock on the sequence shows it.
        early = Transaction(database)
        [(seq,)] = early.execute("SELECT nextval('label_id_seq')")
        database.insert(2)
        async with reading(server.stream_url, cursor=0) as reader:
            await until_held_at(server, database, 0)
            early.insert(id=seq)
            early.commit()
            await reader.until_events(3)
        assert reader.events == database.stored()
        assert seqs(reader) == [1, 2, 3]

    async def test_a_second_hole_behind_the_first(
        self, server: Server, database: TestDatabase
    ) -> None:
        first = Transaction(database)
        first.insert()
        database.insert()
        await until_parked(server)
        second = Transaction(database)
        second.insert()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            first.commit()
            await reader.until_events(2)
            await until_held_at(server, database, 2)
            second.commit()
            await reader.until_events(4)
        assert reader.events == database.stored()


class TestIdsThatNeverCome:
    async def test_a_rolled_back_id_is_waited_for_and_then_passed(
        self, server: Server, database: TestDatabase
    ) -> None:
        lost = Transaction(database)
        lost.insert()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await until_parked(server)
            lost.rollback()
            await reader.until_events(1)
        assert reader.events == database.stored()
        assert seqs(reader) == [2]
        assert server.app.feed.sequencer.head == 2

    async def test_an_id_that_was_rolled_back_before_costs_no_wait(
        self, server: Server, database: TestDatabase
    ) -> None:
        database.insert()
        lost = Transaction(database)
        lost.insert()
        lost.rollback()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_events(2)
        assert reader.events == database.stored()
        assert seqs(reader) == [1, 3]
        assert server.app.metrics.count["holes"] == 0

    async def test_rollback_to_savepoint_keeps_the_rest_of_its_transaction(
        self, server: Server, database: TestDatabase
    ) -> None:
        writer = Transaction(database)
        writer.insert()
        writer.execute("SAVEPOINT here")
        writer.insert(2)
        writer.execute("ROLLBACK TO SAVEPOINT here")
        writer.insert()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await until_parked(server)
            writer.commit()
            await reader.until_events(3)
        assert reader.events == database.stored()
        assert seqs(reader) == [1, 4, 5]

    async def test_the_only_id_may_have_been_taken_in_a_savepoint_that_is_gone(
        self, server: Server, database: TestDatabase
    ) -> None:
        writer = Transaction(database)
        writer.execute("SAVEPOINT here")
        writer.insert()
        writer.execute("ROLLBACK TO SAVEPOINT here")
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            # The lock outlives the savepoint: its owner may still use the number it took.
            await until_held_at(server, database, 0)
            writer.insert(id=1)
            writer.commit()
            await reader.until_events(2)
        assert reader.events == database.stored()


class TestTwoPhaseCommits:
    @pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
    async def test_a_prepared_transaction_is_waited_for(
        self, server: Server, database: TestDatabase, ending: str
    ) -> None:
        writer = Transaction(database)
        writer.insert_unnotified()
        writer.prepare("first")
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await until_held_at(server, database, 0)
            database.execute(f"{ending} PREPARED 'first'")
            await reader.until_seq(2)
        assert reader.events == database.stored()
        assert seqs(reader) == ([1, 2] if ending == "COMMIT" else [2])

    async def test_a_transaction_may_prepare_while_it_is_waited_for(
        self, server: Server, database: TestDatabase
    ) -> None:
        writer = Transaction(database)
        writer.insert_unnotified()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await until_parked(server)
            writer.prepare("first")
            # Its session goes on to other things, which also hold the lock on the sequence.
            writer.execute("BEGIN")
            writer.insert()
            await until_looked(database)
            assert server.app.feed.sequencer.head == 0
            database.execute("COMMIT PREPARED 'first'")
            await reader.until_events(2)
            writer.commit()
            await reader.until_events(3)
        assert reader.events == database.stored()

    async def test_a_prepared_transaction_is_waited_for_across_a_restart(self) -> None:
        with (
            reachable_directory() as directory,
            closing(Restartable(directory)) as postgres,
        ):
            database = TestDatabase(postgres.dsn, "sse_labels")
            async with App(Settings(**{**QUICK, "migrate": True}), postgres.dsn, None).running():
                pass
            app = App(Settings(**QUICK), postgres.dsn, None)
            async with app.running() as port:
                server = Server(app, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/stream")
                async with reading(server.stream_url, cursor=0) as reader:
                    writer = Transaction(database)
                    writer.insert_unnotified()
                    writer.prepare("first")
                    database.insert()
                    await until_parked(server)
                    # It comes back under another virtual transaction id.
                    await asyncio.to_thread(postgres.restart)
                    await until(
                        lambda: (
                            app.feed.sequencer.following and app.feed.listener.listening.is_set()
                        )
                    )
                    await until_looked(database)
                    assert app.feed.sequencer.head == 0
                    database.execute("COMMIT PREPARED 'first'")
                    await reader.until_events(2)
            assert reader.events == database.stored()
            database.close()


class Restartable:
    """A PostgreSQL of one test's own, which that test may restart."""

    def __init__(self, directory: Any) -> None:
        self._server = EmbeddedPostgres(
            directory, settings={**NOT_DURABLE, "max_prepared_transactions": "5"}
        )
        self._server.start()
        self.dsn = self._server.dsn

    def restart(self) -> None:
        self._server.stop()
        self._server.start()

    def close(self) -> None:
        self._server.stop()


UPSERT = (
    "INSERT INTO label (src, uri, cid, val, neg, cts) VALUES"
    " ('did:plc:aaaaaaaaaaaaaaaaaaaaaaaa', %s, '', 'spam', %s, '2026-01-01T00:00:00.000Z')"
    " ON CONFLICT (src, uri, cid, val) DO UPDATE"
    " SET id = excluded.id, neg = excluded.neg, cts = excluded.cts RETURNING id"
)
HOT, COLD = "at://did:plc:hot", "at://did:plc:cold"


class TestUpserts:
    """Ozone's table keeps one row per key and gives it a new id: ours is made so here."""

    @pytest.fixture(autouse=True)
    def like_ozone(self, database: TestDatabase) -> None:
        database.execute("DROP TRIGGER label_refuse_change ON label")
        database.execute("CREATE UNIQUE INDEX ON label (src, uri, cid, val)")

    async def test_an_upsert_that_waits_for_a_row_holds_its_id(
        self, server: Server, database: TestDatabase
    ) -> None:
        database.execute(UPSERT, (HOT, False))
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_events(1)
            holder = Transaction(database)
            assert holder.execute(UPSERT, (HOT, True)) == [(2,)]
            waiting = asyncio.create_task(asyncio.to_thread(database.execute, UPSERT, (HOT, False)))
            await until(database.waiting_for_locks)
            assert database.execute(UPSERT, (COLD, False)) == [(4,)]
            await until_held_at(server, database, 1)
            holder.rollback()
            assert await waiting == [(3,)]
            await reader.until_seq(4)
            # The hot row moved on from 1 after that had been delivered: what came last counts.
            assert seqs(reader) == [1, 3, 4]
            assert newest_by_uri(reader) == database.stored()

    async def test_upserts_of_one_hot_row_by_many_writers(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        def write(writer: int) -> None:
            connection = psycopg2.connect(database.dsn)
            connection.autocommit = True
            with closing(connection), connection.cursor() as cursor:
                for turn in range(60):
                    uri = HOT if turn % 2 else f"{COLD}/{writer}/{turn}"
                    cursor.execute(UPSERT, (uri, bool(turn % 4)))

        # The ring is too small for history, so each row is read again where it stands last.
        async with run_server(ring_max_bytes=0) as server:
            async with reading(server.stream_url, cursor=0) as reader:
                with ThreadPoolExecutor(4) as threads:
                    loop = asyncio.get_running_loop()
                    writing = [loop.run_in_executor(threads, write, number) for number in range(4)]
                    await asyncio.gather(*writing)
                last = database.insert(uri="at://did:plc:last")[0]
                await reader.until_seq(last)
                assert newest_by_uri(reader) == database.stored()
                assert seqs(reader) == sorted(set(seqs(reader)))
            async with reading(server.stream_url, cursor=0) as again:
                await again.until_seq(last)
            assert again.events == database.stored()


def newest_by_uri(reader: Reader) -> list[dict[str, Any]]:
    """What a consumer knows who keeps one label per URI, the one that came last."""
    known = {event["labels"][0]["uri"]: event for event in reader.events}
    return sorted(known.values(), key=lambda event: event["seq"])


class TestHolesAndPages:
    async def test_more_rolled_back_ids_than_a_page_holds(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        async with (
            run_server(page_max_events=3) as server,
            reading(server.stream_url, cursor=0) as reader,
        ):
            lost = Transaction(database)
            lost.insert(10)
            database.insert(8)
            await until_held_at(server, database, 0)
            lost.rollback()
            await reader.until_events(8)
            assert reader.events == database.stored()
            assert seqs(reader) == list(range(11, 19))

    async def test_a_bulk_transaction_of_many_pages_that_commits_late(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        async with (
            run_server(page_max_events=3) as server,
            reading(server.stream_url, cursor=0) as reader,
        ):
            bulk = Transaction(database)
            database.insert(2)
            bulk.insert(20)
            database.insert(20)
            await until_held_at(server, database, 2)
            bulk.commit()
            await reader.until_events(42)
            assert reader.events == database.stored()

    async def test_a_page_that_ends_at_the_hole(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        async with (
            run_server(page_max_events=3) as server,
            reading(server.stream_url, cursor=0) as reader,
        ):
            first = Transaction(database)
            first.insert(3)
            hole = Transaction(database)
            hole.insert()
            database.insert(4)
            await until_parked(server)
            first.commit()
            await reader.until_events(3)
            await until_looked(database)
            assert server.app.feed.sequencer.head == 3
            hole.commit()
            await reader.until_events(8)
            assert reader.events == database.stored()

    async def test_a_backfill_stops_at_the_hole(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.insert(5)
        async with run_server(page_max_events=2, ring_max_bytes=0) as server:
            hole = Transaction(database)
            hole.insert()
            database.insert(5)
            await until_parked(server)
            async with reading(server.stream_url, cursor=0) as reader:
                await reader.until_events(5)
                await until_looked(database)
                assert server.app.feed.sequencer.head == 5
                hole.commit()
                await reader.until_events(11)
            assert reader.events == database.stored()


class TestStart:
    @pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
    async def test_a_hole_that_was_open_before_the_start_is_waited_for(
        self, database: TestDatabase, ending: str
    ) -> None:
        database.insert(2)
        hole = Transaction(database)
        hole.insert(2)
        database.insert(2)
        app = App(Settings(**QUICK), database.dsn, None)
        async with app.running() as port, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{port}"
            await until(lambda: database.backends(HOLDERS))
            answer = await client.get(f"{url}/health/ready")
            assert answer.status_code == 503
            assert "no head" in answer.json()["message"]
            assert not app.feed.sequencer.started.is_set()
            opening = asyncio.create_task(read_to(f"{url}/stream", seq=7))
            hole.execute(ending)
            await app.feed.sequencer.started.wait()
            database.insert()
            reader = await opening
            assert (await client.get(f"{url}/health/ready")).status_code == 200
        assert reader.events == database.stored()

    async def test_who_took_an_id_after_the_start_does_not_delay_it(
        self, database: TestDatabase
    ) -> None:
        hole = Transaction(database)
        hole.insert()
        app = App(Settings(**QUICK), database.dsn, None)
        async with app.running() as port:
            await until(lambda: database.backends(HOLDERS))
            later = Transaction(database)
            later.insert()
            hole.commit()
            async with reading(f"http://127.0.0.1:{port}/stream", cursor=0) as reader:
                await reader.until_events(1)
                assert app.feed.sequencer.started.is_set()
                later.commit()
                await reader.until_events(2)
        assert reader.events == database.stored()

    async def test_a_prepared_transaction_from_before_the_start_is_waited_for(
        self, database: TestDatabase
    ) -> None:
        writer = Transaction(database)
        writer.insert_unnotified()
        writer.prepare("first")
        app = App(Settings(**QUICK), database.dsn, None)
        async with app.running() as port:
            await until(lambda: database.backends(HOLDERS))
            assert not app.feed.sequencer.started.is_set()
            database.execute("COMMIT PREPARED 'first'")
            async with reading(f"http://127.0.0.1:{port}/stream", cursor=0) as reader:
                await reader.until_events(1)
        assert reader.events == database.stored()


async def read_to(url: str, seq: int) -> Reader:
    async with reading(url, cursor=0) as reader:
        await reader.until_seq(seq)
    return reader


class TestWhatIsNotWaitedFor:
    async def test_a_long_transaction_that_took_no_id_delays_nothing(
        self, server: Server, database: TestDatabase
    ) -> None:
        idle = Transaction(database)
        # It has a transaction id, has read the labels and the sequence, and stays open.
        idle.execute("CREATE TABLE something_else (n int)")
        idle.execute("SELECT count(*) FROM label")
        idle.execute("SELECT last_value FROM label_id_seq")
        lost = Transaction(database)
        lost.insert()
        lost.rollback()
        database.insert(3)
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_events(3)
        assert reader.events == database.stored()
        assert server.app.metrics.count["holes"] == 0

    async def test_a_sequence_of_another_table_delays_nothing(
        self, server: Server, database: TestDatabase
    ) -> None:
        database.execute("CREATE TABLE something_else (n bigserial)")
        other = Transaction(database)
        other.execute("INSERT INTO something_else DEFAULT VALUES")
        lost = Transaction(database)
        lost.insert()
        lost.rollback()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_events(1)
        assert reader.events == database.stored()
        assert server.app.metrics.count["holes"] == 0

    async def test_who_took_an_id_above_the_hole_does_not_delay_it(
        self, server: Server, database: TestDatabase
    ) -> None:
        hole = Transaction(database)
        hole.insert()
        database.insert()
        async with reading(server.stream_url, cursor=0) as reader:
            await until_parked(server)
            await until_looked(database)
            later = Transaction(database)
            later.insert()
            hole.commit()
            await reader.until_events(2)
            later.commit()
            await reader.until_events(3)
        assert reader.events == database.stored()


class TestMetrics:
    async def test_an_open_hole_is_shown_and_counted(
        self, server: Server, database: TestDatabase
    ) -> None:
        before = await gauges(server)
        assert (before["holes_open"], before["hole_age_seconds"]) == (0, 0)
        hole = Transaction(database)
        hole.insert()
        database.insert()
        await until_parked(server)
        open_now = await gauges(server)
        assert open_now["holes_open"] == 1
        assert open_now["holes_total"] == before["holes_total"] + 1
        assert (await gauges(server))["hole_age_seconds"] > open_now["hole_age_seconds"] > 0
        async with reading(server.stream_url, cursor=0) as reader:
            hole.rollback()
            await reader.until_seq(2)
        after = await gauges(server)
        assert (after["holes_open"], after["hole_age_seconds"]) == (0, 0)
        assert after["holes_total"] == before["holes_total"] + 1
        assert after["head_seq"] == 2
        assert reader.events == database.stored()


class TestRoles:
    async def test_a_writer_that_may_only_insert_is_waited_for(
        self, server: Server, database: TestDatabase
    ) -> None:
        with role(database, "INSERT ON label", "USAGE ON SEQUENCE label_id_seq") as dsn:
            writer = Transaction(database, dsn)
            write = (
                "INSERT INTO label (src, uri, cid, val, cts)"
                " VALUES ('did:plc:a', 'at://did:plc:b', '', 'spam', '2026-01-01T00:00:00Z')"
            )
            writer.execute(write)
            database.insert()
            async with reading(server.stream_url, cursor=0) as reader:
                await until_parked(server)
                writer.commit()
                await reader.until_events(2)
            assert reader.events == database.stored()

    async def test_a_reader_that_may_only_select_sees_the_locks_of_others(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.insert(3)
        with role(database, "SELECT ON label, label_stream") as dsn:
            async with (
                run_server(dsn) as server,
                reading(server.stream_url, cursor=0) as reader,
            ):
                hole = Transaction(database)
                hole.insert()
                database.insert()
                await until_held_at(server, database, 3)
                hole.commit()
                await reader.until_events(5)
                assert reader.events == database.stored()

    async def test_a_reader_that_may_only_select_reads_history_that_begins_with_a_hole(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        lost = Transaction(database)
        lost.insert()
        lost.rollback()
        database.insert(3)
        with role(database, "SELECT ON label, label_stream") as dsn:
            async with (
                run_server(dsn) as server,
                reading(server.stream_url, cursor=0) as reader,
            ):
                async with asyncio.timeout(5):
                    await reader.until_events(3)
                assert reader.events == database.stored()

    async def test_a_reader_that_may_only_select_follows_on_after_a_reconnect(
        self, run_server: RunServer, database: TestDatabase
    ) -> None:
        database.insert(3)
        with role(database, "SELECT ON label, label_stream") as dsn:
            async with (
                run_server(dsn) as server,
                reading(server.stream_url, cursor=0) as reader,
            ):
                await reader.until_events(3)
                database.terminate(database.backends())
                database.insert()
                await reader.until_events(4)
                assert server.app.metrics.count["database_reconnects"] >= 1
                assert reader.events == database.stored()


#: Long enough for many holes; a longer run is for who looks for a fault.
STRESS_SECONDS = float(os.environ.get("STRESS_SECONDS") or 4)
WRITERS = 6


class Writer:
    """One thread's random mix of what transactions do; counts what it committed."""

    def __init__(self, dsn: str, number: int, seed: int) -> None:
        self._dsn = dsn
        self._number = number
        self._random = random.Random(seed * WRITERS + number)
        self._made = 0

    def run(self, deadline: float) -> None:
        connection = psycopg2.connect(self._dsn)
        connection.autocommit = True
        with closing(connection), connection.cursor() as cursor:
            self._execute = cursor.execute
            self._fetchone = cursor.fetchone
            while time.monotonic() < deadline:
                self._random.choice(self.MIX)(self)

    def _insert(self, most: int = 3) -> None:
        self._execute(
            "INSERT INTO label (src, uri, cid, val, cts) SELECT 'did:plc:a', %s || n, '', 'spam',"
            " '2026-01-01T00:00:00Z' FROM generate_series(1, %s) AS n",
            (self._uri(), self._random.randint(1, most)),
        )

    def _uri(self) -> str:
        self._made += 1
        return f"at://did:plc:writer{self._number}/{self._made}/"

    def _linger(self) -> None:
        """Stay open while others commit: the delay is what is being tested."""
        if self._random.random() < 0.5:
            time.sleep(self._random.uniform(0.0, 0.03))

    def _end(self, commit: str = "COMMIT", rollback: str = "ROLLBACK") -> None:
        self._execute(commit if self._random.random() < 0.7 else rollback)

    def single(self) -> None:
        self._insert(1)

    def bulk(self) -> None:
        self._insert(60)

    def delayed(self) -> None:
        self._execute("BEGIN")
        self._insert()
        self._linger()
        self._insert()
        self._linger()
        self._end()

    def savepoint(self) -> None:
        self._execute("BEGIN")
        if self._random.random() < 0.5:
            self._insert()
        self._execute("SAVEPOINT here")
        self._insert()
        self._linger()
        if self._random.random() < 0.7:
            self._execute("ROLLBACK TO SAVEPOINT here")
            self._linger()
        if self._random.random() < 0.5:
            self._insert()
        self._end()

    def two_phase(self) -> None:
        gid = f"stress {self._number} {self._made}"
        self._execute("BEGIN")
        self._execute(UNNOTIFIED)
        self._insert()
        self._linger()
        self._execute("PREPARE TRANSACTION %s", (gid,))
        if self._random.random() < 0.5:
            self._insert()
        self._linger()
        self._end(f"COMMIT PREPARED '{gid}'", f"ROLLBACK PREPARED '{gid}'")

    def late_row(self) -> None:
        self._execute("BEGIN")
        self._execute("SELECT nextval('label_id_seq')")
        [seq] = self._fetchone()
        self._linger()
        self._execute(
            "INSERT INTO label (id, src, uri, cid, val, cts)"
            " VALUES (%s, 'did:plc:a', %s, '', 'spam', '2026-01-01T00:00:00Z')",
            (seq, self._uri()),
        )
        self._linger()
        self._end()

    def failing(self) -> None:
        self._execute("BEGIN")
        self._insert()
        try:
            self._execute("INSERT INTO label (src) VALUES ('did:plc:a')")
        except psycopg2.IntegrityError:
            self._linger()
        self._execute("COMMIT")  # Of an aborted transaction: a rollback.

    MIX: tuple[Callable[[Writer], None], ...] = (
        *(single, single, bulk, delayed, delayed, delayed),
        *(savepoint, savepoint, two_phase, two_phase, late_row, failing),
    )


async def read_to_the_end(reader: Reader) -> None:
    """Read until the last label of all has come."""
    while not reader.events or reader.events[-1]["labels"][0]["val"] != "last":
        await reader.until_events(len(reader.events) + 1)


async def test_stress_of_six_writers_arrives_exactly(
    run_server: RunServer, database: TestDatabase
) -> None:
    seed = int(os.environ.get("STRESS_SEED") or random.randrange(2**32))
    print(f"STRESS_SEED={seed}")  # noqa: T201 - shown with a failure, to try it again
    database.fill(500)
    loop = asyncio.get_running_loop()
    # Small pages and a small ring, so that holes span pages and history comes from the table.
    async with run_server(page_max_events=40, ring_max_bytes=50_000) as server:
        async with (
            reading(server.stream_url, cursor=0) as everything,
            reading(server.stream_url) as live,
        ):
            start = await live.until_opened()
            async with asyncio.TaskGroup() as consuming:
                consuming.create_task(read_to_the_end(everything))
                consuming.create_task(read_to_the_end(live))
                deadline = time.monotonic() + STRESS_SECONDS
                with ThreadPoolExecutor(WRITERS) as threads:
                    writers = [Writer(database.dsn, number, seed) for number in range(WRITERS)]
                    await asyncio.gather(
                        *(loop.run_in_executor(threads, writer.run, deadline) for writer in writers)
                    )
                database.insert(val="last")
        async with reading(server.stream_url, cursor=0) as history:
            await read_to_the_end(history)
    assert everything.events == database.stored()
    assert live.events == database.stored(start)
    assert history.events == database.stored()
    assert seqs(everything) == sorted(set(seqs(everything)))
    # Else the writers were too tame to prove anything.
    assert server.app.metrics.count["holes"] > 0
    assert server.app.metrics.count["broken_promises"] == 0
