"""Whose table it is: found out, or as it was asked for, and of Ozone's nothing is ever changed."""

from __future__ import annotations

import aiohttp
import psycopg2
import pytest

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.errors import ConfigError, DatabaseUnavailable, SchemaError

from support.database import OZONE_TABLES, TestDatabase, role, until
from support.reading import reading
from support.server import PUBLISH_TOKEN, QUICK, RunServer

SIG = bytes(64)


@pytest.fixture
def foreign(empty_database: TestDatabase) -> TestDatabase:
    """A database as Ozone leaves it."""
    empty_database.execute(OZONE_TABLES)
    return empty_database


async def test_a_role_that_may_only_select_from_label_is_enough(
    run_server: RunServer, foreign: TestDatabase
) -> None:
    foreign.insert(3, neg=False, sig=SIG)
    with role(foreign, "SELECT ON label") as dsn:
        async with run_server(dsn, migrate=True) as server:
            assert server.app.schema.attached
            async with reading(server.stream_url, cursor=0) as stream:
                await stream.until_seq(3)
                foreign.insert(1, val="rude", neg=True)
                assert await stream.until_seq(4) == foreign.stored()


async def test_a_session_of_an_attached_server_cannot_write(
    run_server: RunServer, foreign: TestDatabase
) -> None:
    async with run_server(foreign.dsn) as server, server.app.database.borrow() as connection:
        with pytest.raises(DatabaseUnavailable, match="read-only transaction"):
            await connection.execute("DELETE FROM label")


async def test_publishing_into_ozones_table_is_forbidden_and_says_why(
    run_server: RunServer, foreign: TestDatabase
) -> None:
    label = {
        "src": "did:plc:" + "a" * 24, "uri": "did:plc:" + "b" * 24, "val": "spam",
        "cts": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    async with run_server(foreign.dsn) as server, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {PUBLISH_TOKEN}"}
        async with session.post(
            f"{server.url}/labels", json={"labels": [label]}, headers=headers
        ) as answer:
            said = await answer.json()
            assert answer.status == 403
    assert "Ozone" in said["message"]
    assert foreign.stored() == []


async def start(dsn: str, **settings: object) -> None:
    app = App(Settings(**{**QUICK, "migrate": True, **settings}), dsn, None)
    async with app.running():
        pass


async def test_retention_of_ozones_labels_is_refused(foreign: TestDatabase) -> None:
    with pytest.raises(ConfigError, match=r"--retention-max-labels.*Ozone's table is read"):
        await start(foreign.dsn, retention_max_labels=10)


async def test_ozones_database_is_refused_when_our_own_is_asked_for(foreign: TestDatabase) -> None:
    with pytest.raises(SchemaError, match=r"--source: got 'own'.*this database is Ozone's"):
        await start(foreign.dsn, source="own")


async def test_our_own_database_is_refused_when_ozones_is_asked_for(database: TestDatabase) -> None:
    with pytest.raises(SchemaError, match=r"--source: got 'ozone'.*made by sse-labels"):
        await start(database.dsn, source="ozone")


async def test_an_empty_database_is_refused_when_ozones_is_asked_for(
    empty_database: TestDatabase,
) -> None:
    with pytest.raises(SchemaError, match="search_path"):
        await start(empty_database.dsn, source="ozone")
    with pytest.raises(psycopg2.errors.UndefinedTable):
        empty_database.execute("TABLE label")


async def test_unsigned_labels_are_streamed_unless_they_are_to_be_withheld(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(1, sig=SIG)
    database.insert(2)
    async with (
        run_server() as server,
        reading(server.stream_url, cursor=0) as stream,
    ):
        assert await stream.until_seq(3) == database.stored()


async def test_withheld_labels_are_nowhere_and_those_that_come_new_are_counted(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(1, sig=SIG)
    database.insert(2)
    async with (
        run_server(unsigned="withhold", page_max_events=1, ring_max_bytes=0) as server,
        reading(server.stream_url, cursor=0) as stream,
        aiohttp.ClientSession() as session,
    ):
        await stream.until_seq(3)
        database.insert(1)
        database.insert(1, sig=SIG)
        await stream.until_seq(5)
        signed = [event for event in database.stored() if "sig" in event["labels"][0]]
        assert stream.events == signed
        await until(lambda: server.app.metrics.count["unsigned_withheld"] == 1)
        url = f"{server.url}/xrpc/com.atproto.label.queryLabels?uriPatterns=*&limit=1"
        async with session.get(url) as answer:
            first = await answer.json()
        async with session.get(f"{url}&cursor={first['cursor']}") as answer:
            second = await answer.json()
    assert "cursor" not in second
    assert first["labels"] + second["labels"] == [event["labels"][0] for event in signed]


async def test_a_snapshot_agrees_with_a_stream_from_which_a_negation_is_withheld(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(1, sig=SIG)
    database.insert(1, neg=True)
    async with run_server(unsigned="withhold") as server:
        for query in ({"cursor": 0}, {"snapshot": "active"}):
            async with reading(server.stream_url, **query) as stream:
                assert await stream.until_seq(2) == database.stored()[:1]
        url = f"{server.url}/xrpc/com.atproto.label.queryLabels?uriPatterns=*&snapshot=active"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert len((await answer.json())["labels"]) == 1
