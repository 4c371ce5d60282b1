"""What a session leans on holds, whatever role, database, DSN and environment say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.database.migrations import migrate
from sse_labels.database.pool import PINNED, Database
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.errors import SchemaError

from support.clock import Clock, at
from support.database import TestDatabase, role
from support.pgbouncer import pgbouncer
from support.program import called_all, failure
from support.reading import reading
from support.server import PUBLISH_TOKEN, QUICK, RunServer, until_head

#: The other value, or one that changes what is sent or read, of all that a session can change and a
#: statement could lean on.
HOSTILE = {
    "client_encoding": "LATIN1",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "bytea_output": "escape",
    "xmlbinary": "hex",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Tokyo",
    "extra_float_digits": "-15",
    "row_security": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "synchronous_commit": "off",
    "idle_session_timeout": "1s",
    "idle_in_transaction_session_timeout": "1s",
    "client_min_messages": "error",
    "exit_on_error": "on",
    "search_path": "pg_catalog, public",
    "default_text_search_config": "pg_catalog.simple",
    "check_function_bodies": "off",
    "plan_cache_mode": "force_generic_plan",
    "enable_indexscan": "off",
    "jit_above_cost": "0",
}
#: Those that a superuser alone may set, for everybody in a database.
HOSTILE_BY_A_SUPERUSER = {"track_activities": "off"}
ENVIRONMENT = {
    "PGCLIENTENCODING": "LATIN1",
    "PGOPTIONS": "-c client_encoding=LATIN1 -c array_nulls=off",
    "PGTZ": "Asia/Tokyo",
    "PGDATESTYLE": "SQL, DMY",
    "PGGEQO": "off",
}
PUBLISH = (
    "SELECT, INSERT ON label",
    "SELECT ON label_stream, sse_labels_migration",
    "SELECT, USAGE ON SEQUENCE label_id_seq",
    "SELECT, INSERT, UPDATE, DELETE ON label_request",
)
SOURCE = f"did:plc:{'a' * 24}"
#: No encoding but UTF8 has all of them.
VALUES = ("日本", "é", "🏷️", "it's \\ 'E", "نص")


def label(number: int, **fields: Any) -> dict[str, Any]:
    uri = f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{number}"
    val = VALUES[number % len(VALUES)]
    return {"src": SOURCE, "uri": uri, "val": val, "cts": "2026-01-01T00:00:00.000Z", **fields}


@contextmanager
def hostile(database: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The DSN of a role that may publish, where everything says something else."""
    # What a test itself asks is asked in UTF8.
    database.dsn = make_dsn(database.dsn, client_encoding="UTF8")
    with role(database, *PUBLISH) as dsn:
        name = parse_dsn(dsn)["user"]
        for place in (f"DATABASE {database.name}", f"ROLE {name}"):
            for setting, value in HOSTILE.items():
                given = value if setting == "search_path" else f"'{value}'"
                database.execute(f"ALTER {place} SET {setting} = {given}")
        for setting, value in HOSTILE_BY_A_SUPERUSER.items():
            database.execute(f"ALTER DATABASE {database.name} SET {setting} = '{value}'")
        for variable, value in ENVIRONMENT.items():
            monkeypatch.setenv(variable, value)
        said = " ".join(
            f"-c {setting}={value}".replace(", ", ",\\ ") for setting, value in HOSTILE.items()
        )
        yield make_dsn(dsn, options=said, client_encoding="LATIN1")


async def test_labels_go_their_whole_way_whatever_settings_the_session_would_have(
    database: TestDatabase, run_server: RunServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hostile(database, monkeypatch) as dsn:
        async with (
            run_server(dsn) as server,
            reading(server.stream_url, cursor=0, expired="live") as stream,
            httpx.AsyncClient(base_url=server.url, verify=False) as client,
        ):
            clock = Clock(server)
            await stream.until_opened()
            for number in range(5):
                # By another program.
                database.insert(1, **label(number), sig=b"\\x\x00'\xff" * 16)
            for given in (
                [label(number) for number in range(5, 10)],
                [label(10, exp=at(5)), label(11, neg=True), label(12, cid="bafyreib2rxk3rh6kz")],
            ):
                answer = await client.post(
                    "/labels",
                    json={"labels": given},
                    headers={
                        "Authorization": f"Bearer {PUBLISH_TOKEN}",
                        "Idempotency-Key": given[0]["uri"],
                    },
                )
                assert answer.status_code == 201, answer.text
            await until_head(server, 13)
            stored = database.stored()
            wanted = [label(number) for number in range(13)]
            assert [
                {name: event["labels"][0][name] for name in ("src", "uri", "val", "cts")}
                for event in stored
            ] == [{name: each[name] for name in ("src", "uri", "val", "cts")} for each in wanted]
            assert [event["labels"][0].get("exp") for event in stored] == [
                at(5) if number == 10 else None for number in range(13)
            ]
            assert await stream.until_events(13) == stored
            async with reading(server.stream_url, snapshot="active") as other:
                await other.until_news("info")
                # One is a negation, and one has expired by the machine's clock.
                assert other.events == [*stored[:10], stored[12]]
            # From the table, not the ring.
            page = await server.app.feed.store.page(0, 13, 100)
            assert [row.seq for row in page.rows] == list(range(1, 14))
            for pattern in ("at://*", *(event["labels"][0]["uri"] for event in stored)):
                query = {"uriPatterns": pattern, "values": VALUES}
                answer = await client.get("/xrpc/com.atproto.label.queryLabels", params=query)
                assert answer.json()["labels"] == [
                    event["labels"][0]
                    for event in stored
                    if pattern in ("at://*", event["labels"][0]["uri"])
                ]
            clock.set(5)
            assert (await stream.until_news("info"))["label"] == stored[10]["labels"][0]


@pytest.fixture
async def shown(database: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All settings of a session of this program in hostile surroundings."""
    with hostile(database, monkeypatch) as dsn:
        return await settings_of(dsn)


async def settings_of(dsn: str) -> dict[str, str]:
    edge = Database(dsn, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=1)
    try:
        async with edge.borrow() as connection:
            return {name: value for name, value, *_ in await connection.execute("SHOW ALL")}
    finally:
        edge.close()


async def test_every_setting_that_is_pinned_wins(shown: dict[str, str]) -> None:
    pinned = {**PINNED, "client_encoding": "UTF8", "idle_session_timeout": "0"}
    assert {name: shown[name] for name in pinned} == pinned


async def test_what_a_pooler_drops_is_set_all_the_same(
    database: TestDatabase, run_server: RunServer
) -> None:
    for setting in PINNED:
        database.execute(f"ALTER DATABASE {database.name} SET {setting} = '{HOSTILE[setting]}'")
    with pgbouncer(database.dsn, "session") as through:
        shown = await settings_of(through)
        async with run_server(through) as server, httpx.AsyncClient(verify=False) as client:
            answer = await client.post(
                f"{server.url}/labels",
                json={"labels": [label(number) for number in range(5)]},
                headers={"Authorization": f"Bearer {PUBLISH_TOKEN}"},
            )
            assert answer.status_code == 201, answer.text
    pinned = {**PINNED, "standard_conforming_strings": "off"}
    assert {name: shown[name] for name in pinned} == pinned
    stored = [event["labels"][0] for event in database.stored()]
    assert [each["val"] for each in stored] == list(VALUES)
    assert not any("exp" in each for each in stored)


async def test_what_is_published_is_on_the_disk_at_least(
    shown: dict[str, str], database: TestDatabase
) -> None:
    assert shown["synchronous_commit"] == "local"
    # More than that is the operator's to say.
    for said in ("local", "remote_write", "on", "remote_apply"):
        options = f"-c synchronous_commit={said}"
        assert (await settings_of(make_dsn(database.dsn, options=options)))[
            "synchronous_commit"
        ] == said


async def test_triggers_fire_for_a_role_that_may_have_them_fire(database: TestDatabase) -> None:
    database.execute(f"ALTER DATABASE {database.name} SET session_replication_role = replica")
    assert (await settings_of(database.dsn))["session_replication_role"] == "origin"


async def test_a_role_that_cannot_have_triggers_fire_is_refused(database: TestDatabase) -> None:
    with role(database, *PUBLISH) as dsn:
        assert (await settings_of(dsn))["session_replication_role"] == "origin"
        name = parse_dsn(dsn)["user"]
        database.execute(f"ALTER ROLE {name} SET session_replication_role = replica")
        with pytest.raises(SchemaError, match="RESET session_replication_role"):
            await settings_of(dsn)


async def test_the_schema_that_a_role_or_the_dsn_names_is_read(database: TestDatabase) -> None:
    database.execute("ALTER DATABASE " + database.name + " SET search_path = nothing, public")
    assert (await settings_of(database.dsn))["search_path"] == "nothing, public"
    named = make_dsn(database.dsn, options="-csearch_path=ozone")
    assert (await settings_of(named))["search_path"] == "ozone"


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "EUC_JP"])
def not_unicode(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of an empty database of another encoding."""
    name = f"in_{request.param.lower()}"
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{request.param}' LOCALE 'C'"
        )
        try:
            yield make_dsn(postgres.dsn, dbname=name)
        finally:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


async def test_a_database_that_cannot_hold_every_label_is_refused_with_the_remedy(
    not_unicode: str,
) -> None:
    app = App(Settings(**{**QUICK, "migrate": True}), not_unicode, PUBLISH_TOKEN)
    with pytest.raises(SchemaError, match="ENCODING 'UTF8'"):
        async with app.running():
            pass
    edge = Database(
        not_unicode, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=1
    )
    with pytest.raises(SchemaError, match="ENCODING 'UTF8'"):
        await migrate(edge)
    edge.close()
    # Nothing was made in it.
    with psycopg2.connect(not_unicode) as plain, plain.cursor() as cursor:
        cursor.execute("SELECT to_regclass('label')")
        assert cursor.fetchall() == [(None,)]
    plain.close()


# Each of the encodings is refused by what all commands call: see the test before.
@pytest.mark.parametrize("not_unicode", ["EUC_JP"], indirect=True)
def test_each_command_names_the_encoding_and_the_remedy(not_unicode: str) -> None:
    calls = (("serve", "--port=0"), ("migrate",), ("doctor",))
    *refused, doctor = called_all([((*call, "--dsn", not_unicode), {}) for call in calls])
    assert [failure(program)[0] for program in refused] == [2, 2]
    assert doctor.status == 1
    for program in (*refused, doctor):
        said = " ".join(" ".join([*program.out, *program.err]).split())
        assert "EUC_JP" in said
        assert "ENCODING 'UTF8'" in said
