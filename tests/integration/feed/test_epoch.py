"""A database that was rebuilt is noticed, and cursors of its former life are not guessed at."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from sse_labels.database.epochs import reseed
from sse_labels.errors import BrokenPromise, SchemaError

from support.database import TestDatabase, role
from support.reading import reading
from support.server import RunServer, Server, until_head


def epoch_of(database: TestDatabase) -> str:
    [(epoch,)] = database.execute("SELECT epoch::text FROM label_stream")
    return epoch


async def test_stream_tells_its_epoch_in_a_header_and_at_its_start(
    server: Server, database: TestDatabase
) -> None:
    database.insert(2)
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(2)
    assert reader.response.headers["Sse-Labels-Epoch"] == epoch_of(database)
    assert reader.opened["epoch"] == epoch_of(database)
    assert reader.opened["cursor"] == 0
    assert reader.events == database.stored()


async def test_consumer_that_names_this_epoch_is_served(
    server: Server, database: TestDatabase
) -> None:
    database.insert(2)
    async with reading(server.stream_url, cursor=1, epoch=epoch_of(database)) as reader:
        await reader.until_events(1)
    assert reader.events == database.stored(after=1)


async def test_consumer_that_names_another_epoch_is_told_so(server: Server) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.get(server.stream_url, params={"epoch": "other", "cursor": "7"})
    assert answer.status_code == 409
    assert answer.json()["error"] == "EpochChanged"
    # A browser is told inside a stream: of any other status it sees nothing.
    async with reading(server.stream_url, epoch="other", cursor=7) as reader:
        await reader.until_closed()
    assert [(name, data["error"]) for name, data in reader.news] == [("error", "EpochChanged")]
    assert reader.last_id == "7"


async def test_consumer_of_another_epoch_is_given_no_position_in_this_one(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    await until_head(server, 3)
    async with reading(server.stream_url, epoch="other") as reader:
        await reader.until_closed()
    assert [(name, data["error"]) for name, data in reader.news] == [("error", "EpochChanged")]
    assert reader.last_id == ""


async def test_same_database_keeps_its_epoch_over_restarts(
    run_server: RunServer, database: TestDatabase
) -> None:
    seen = set()
    for _ in range(3):
        async with run_server(migrate=True) as server:
            seen.add(server.app.feed.sequencer.epoch)
    assert seen == {epoch_of(database)}


async def test_rebuilt_database_gets_another_epoch_at_the_next_start(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(migrate=True) as server:
        before = server.app.feed.sequencer.epoch
    # A backup restored elsewhere brings the identity of where it was taken.
    database.execute("UPDATE label_stream SET identity = 'another/cluster/1'")
    async with run_server(migrate=True) as server:
        after = server.app.feed.sequencer.epoch
    assert before != after == epoch_of(database)


async def test_role_that_owns_the_tables_claims_the_epoch(
    run_server: RunServer, database: TestDatabase
) -> None:
    with role(database, f"ALL ON DATABASE {database.name}", "ALL ON SCHEMA public") as dsn:
        owner = make_dsn(dsn)
        name = parse_dsn(dsn)["user"]
        for kind, thing in database.execute(
            "SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, relname FROM pg_class"
            " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        ):
            database.execute(f"ALTER {kind} {thing} OWNER TO {name}")
        database.execute("UPDATE label_stream SET identity = 'another/cluster/1'")
        before = epoch_of(database)
        async with run_server(owner, migrate=True) as server:
            assert server.app.feed.sequencer.epoch == epoch_of(database) != before
        database.execute(f"REASSIGN OWNED BY {name} TO postgres")


async def test_epoch_that_changes_under_a_running_server_stops_it(
    run_server: RunServer, database: TestDatabase
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with run_server() as server:
            database.execute("UPDATE label_stream SET epoch = gen_random_uuid()")
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
    assert caught.group_contains(BrokenPromise)
    assert server.app.metrics.count["broken_promises"] == 1


async def test_reseed_moves_the_sequence_above_and_begins_a_new_epoch(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(3)
    before = epoch_of(database)
    async with run_server() as server:
        assert await reseed(server.app.database, 500) == (500, epoch_of(database))
    assert epoch_of(database) != before
    assert database.insert() == [501]
    async with run_server() as server, reading(server.stream_url, cursor=0) as reader:
        await reader.until_seq(501)
    assert reader.events == database.stored()


async def test_reseed_below_the_newest_seq_moves_nothing_back(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(3)
    async with run_server() as server:
        assert (await reseed(server.app.database, 1))[0] == 3
    assert database.insert() == [4]


async def test_server_that_may_not_begin_an_epoch_refuses_a_rebuilt_database(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with run_server(migrate=True):
        pass
    with role(database, "SELECT ON label, label_stream", "SELECT ON SEQUENCE label_id_seq") as dsn:
        async with run_server(dsn) as server:
            assert server.app.feed.sequencer.epoch == epoch_of(database)
        database.execute("UPDATE label_stream SET identity = 'another/cluster/1'")
        with pytest.raises(SchemaError, match="Run `sse-labels migrate`"):
            async with run_server(dsn):
                pass


async def test_epoch_that_another_server_begins_is_noticed_at_the_next_sweep(
    run_server: RunServer, database: TestDatabase
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with run_server(retention_sweep_seconds=0.05):
            database.execute("UPDATE label_stream SET epoch = gen_random_uuid()")
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
    assert caught.group_contains(BrokenPromise, match="has begun epoch")
