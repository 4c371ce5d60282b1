"""The schema: applied once and whole, refused when it is somebody else's, and what it guards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import psycopg2
import pytest

from sse_labels.database import queries
from sse_labels.database.migrations import migrate
from sse_labels.database.pool import Database
from sse_labels.database.queries import Migration, migrations
from sse_labels.database.schema import Schema
from sse_labels.errors import DatabaseRefused, SchemaError
from sse_labels.feed.store import Store, TableState

from support.database import TestDatabase, until

NEWEST = migrations()[-1].number


def edge_to(database: TestDatabase) -> Database:
    return Database(
        database.dsn, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=2
    )


@pytest.fixture
async def empty(empty_database: TestDatabase) -> AsyncIterator[Database]:
    """The edge to a database without any table."""
    edge = edge_to(empty_database)
    yield edge
    edge.close()


@pytest.fixture
async def migrated(database: TestDatabase) -> AsyncIterator[Database]:
    """The edge to a migrated database."""
    edge = edge_to(database)
    yield edge
    edge.close()


def schema(database: TestDatabase) -> list[tuple[Any, ...]]:
    """Everything in the database that somebody made, as far as a migration could touch it."""
    return database.execute(
        "SELECT 'column', table_name || '.' || column_name, data_type, column_default, is_nullable"
        "  FROM information_schema.columns WHERE table_schema = 'public'"
        " UNION ALL SELECT 'index', indexname, indexdef, NULL, NULL FROM pg_indexes"
        "  WHERE schemaname = 'public'"
        " UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid), NULL, NULL FROM pg_trigger"
        " UNION ALL SELECT 'function', proname, prosrc, NULL, NULL FROM pg_proc"
        "  WHERE pronamespace = 'public'::regnamespace"
        " UNION ALL SELECT 'sequence', seqrelid::regclass::text, seqcache::text, NULL, NULL"
        "  FROM pg_sequence ORDER BY 1, 2, 3"
    )


def applied(database: TestDatabase) -> list[int]:
    return [
        n
        for (n,) in database.execute("SELECT number FROM sse_labels_migration ORDER BY number")
    ]  # fmt: skip


class TestMigrate:
    async def test_an_empty_database_gets_the_whole_schema(
        self, empty: Database, empty_database: TestDatabase, database: TestDatabase
    ) -> None:
        assert await migrate(empty) == NEWEST
        assert applied(empty_database) == list(range(1, NEWEST + 1))
        assert schema(empty_database) == schema(database)
        await Schema(empty).check()

    async def test_again_is_harmless(self, migrated: Database, database: TestDatabase) -> None:
        database.insert(3)
        before = (schema(database), database.stored(), applied(database))
        for _ in range(2):
            assert await migrate(migrated) == NEWEST
        assert (schema(database), database.stored(), applied(database)) == before

    async def test_two_at_once_apply_each_migration_once(
        self, empty: Database, empty_database: TestDatabase
    ) -> None:
        gate = empty_database.connect().cursor()
        gate.execute(queries.block("lock_schema"))
        migrating = [asyncio.create_task(migrate(empty)) for _ in range(2)]
        await until(lambda: empty_database.waiting_for_locks() == 2)
        gate.execute("SELECT pg_advisory_unlock_all()")
        assert await asyncio.gather(*migrating) == [NEWEST, NEWEST]
        assert applied(empty_database) == list(range(1, NEWEST + 1))
        await Schema(empty).check()

    async def test_a_newer_schema_is_refused(
        self, migrated: Database, database: TestDatabase
    ) -> None:
        database.execute(
            "INSERT INTO sse_labels_migration (number, name) VALUES (%s, 'from_the_future')",
            (NEWEST + 1,),
        )
        before = schema(database)
        with pytest.raises(SchemaError, match=f"got {NEWEST + 1}.*at most {NEWEST}"):
            await migrate(migrated)
        assert schema(database) == before

    async def test_a_foreign_label_table_is_refused_and_untouched(
        self, empty: Database, empty_database: TestDatabase
    ) -> None:
        empty_database.execute(
            "CREATE TABLE label (id bigserial PRIMARY KEY, src varchar NOT NULL,"
            " uri varchar NOT NULL, cid varchar NOT NULL, val varchar NOT NULL, neg boolean,"
            ' cts varchar NOT NULL, exp varchar, sig bytea, "signingKeyId" integer)'
        )
        empty_database.insert(3)
        before = (schema(empty_database), empty_database.stored())
        with pytest.raises(SchemaError, match="another program"):
            await migrate(empty)
        assert (schema(empty_database), empty_database.stored()) == before
        # Served as it is: nothing of ours is needed to read it.
        store = Store(empty, Schema(empty))
        await store.schema.check()
        assert (await store.state(), await store.newest()) == (TableState(1, None), 3)

    async def test_the_next_migration_keeps_the_labels(
        self, migrated: Database, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database.insert(3)
        before = database.stored()
        following = Migration(
            NEWEST + 1, "next", "CREATE TABLE extra (n int); INSERT INTO extra VALUES (1);"
        )
        monkeypatch.setattr(
            "sse_labels.database.migrations.migrations", lambda: (*migrations(), following)
        )
        assert await migrate(migrated) == NEWEST + 1
        assert applied(database) == list(range(1, NEWEST + 2))
        assert database.execute("SELECT n FROM extra") == [(1,)]
        assert database.stored() == before

    async def test_a_failing_migration_leaves_nothing(
        self, migrated: Database, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = schema(database)
        for failure in ("SELECT 1 / 0", "SELECT FROM nowhere", "no SQL at all"):
            changes = "CREATE TABLE extra (n int); DROP TRIGGER label_notify ON label"
            known = (*migrations(), Migration(NEWEST + 1, "fails", f"{changes}; {failure};"))
            monkeypatch.setattr(
                "sse_labels.database.migrations.migrations", lambda known=known: known
            )
            with pytest.raises(DatabaseRefused) as caught:
                await migrate(migrated)
            assert isinstance(caught.value.__cause__, psycopg2.Error)
            assert schema(database) == before
            assert applied(database) == list(range(1, NEWEST + 1))
        # The lock went with the session: who comes next is not kept waiting.
        monkeypatch.undo()
        assert await migrate(migrated) == NEWEST

    async def test_a_first_migration_that_fails_leaves_an_empty_database(
        self,
        empty: Database,
        empty_database: TestDatabase,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = schema(empty_database)
        broken = (Migration(1, "fails", "CREATE TABLE label (n int); SELECT 1 / 0;"),)
        monkeypatch.setattr("sse_labels.database.migrations.migrations", lambda: broken)
        with pytest.raises(DatabaseRefused):
            await migrate(empty)
        assert schema(empty_database) == before
        monkeypatch.undo()
        assert await migrate(empty) == NEWEST

    async def test_what_succeeded_before_a_failure_stays(
        self,
        empty: Database,
        empty_database: TestDatabase,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        broken = (*migrations(), Migration(NEWEST + 1, "fails", "SELECT 1 / 0;"))
        monkeypatch.setattr("sse_labels.database.migrations.migrations", lambda: broken)
        with pytest.raises(DatabaseRefused):
            await migrate(empty)
        assert applied(empty_database) == list(range(1, NEWEST + 1))
        await Schema(empty).check()


class TestCheck:
    async def test_a_database_without_the_table_is_refused(self, empty: Database) -> None:
        with pytest.raises(SchemaError, match="without a label table"):
            await Schema(empty).check()

    async def test_a_sequence_with_a_cache_is_refused(
        self, migrated: Database, database: TestDatabase
    ) -> None:
        database.execute("ALTER SEQUENCE label_id_seq CACHE 10")
        with pytest.raises(SchemaError, match="CACHE 1"):
            await Schema(migrated).check()
        database.execute("ALTER SEQUENCE label_id_seq CACHE 1")
        await Schema(migrated).check()

    async def test_an_id_without_a_sequence_is_refused(
        self, empty: Database, empty_database: TestDatabase
    ) -> None:
        empty_database.execute("CREATE TABLE label (id bigint PRIMARY KEY)")
        with pytest.raises(SchemaError, match=r"label\.id"):
            await Schema(empty).check()

    async def test_an_identity_column_is_as_good(
        self, empty: Database, empty_database: TestDatabase
    ) -> None:
        empty_database.execute(
            "CREATE TABLE label (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)"
        )
        await Schema(empty).check()


class TestAppendOnly:
    def test_a_change_is_refused(self, database: TestDatabase) -> None:
        database.insert(3)
        before = database.stored()
        for statement in (
            "UPDATE label SET val = 'other'",
            "UPDATE label SET val = 'other' WHERE id = 100",
            "TRUNCATE label",
        ):
            with pytest.raises(psycopg2.errors.RaiseException, match="append-only"):
                database.execute(statement)
            assert database.stored() == before

    def test_a_delete_at_or_above_the_floor_is_refused_whole(self, database: TestDatabase) -> None:
        database.insert(5)
        database.execute("UPDATE label_stream SET floor = 3")
        before = database.stored()
        for which in ("id = 3", "id = 5", "id <= 3", "true"):
            with pytest.raises(psycopg2.errors.RaiseException, match="at or above the floor"):
                database.execute(f"DELETE FROM label WHERE {which}")
            assert database.stored() == before

    def test_a_delete_below_the_floor_is_allowed(self, database: TestDatabase) -> None:
        database.insert(5)
        kept = database.stored(after=2)
        database.execute("UPDATE label_stream SET floor = 3")
        database.execute("DELETE FROM label WHERE id < 3")
        assert database.stored() == kept

    def test_a_delete_of_nothing_is_allowed(self, database: TestDatabase) -> None:
        database.insert()
        database.execute("DELETE FROM label WHERE id > 100")
        assert len(database.stored()) == 1

    def test_there_is_one_state_row_and_its_floor_is_a_seq(self, database: TestDatabase) -> None:
        assert database.execute("SELECT floor FROM label_stream") == [(1,)]
        with pytest.raises(psycopg2.IntegrityError):
            database.execute("INSERT INTO label_stream DEFAULT VALUES")
        with pytest.raises(psycopg2.IntegrityError):
            database.execute("INSERT INTO label_stream (singleton) VALUES (false)")
        with pytest.raises(psycopg2.IntegrityError):
            database.execute("UPDATE label_stream SET floor = 0")


def test_one_notification_per_statement(database: TestDatabase) -> None:
    listening = database.connect()
    listening.cursor().execute("LISTEN label_channel")

    def received() -> int:
        listening.cursor().execute("SELECT 1")  # What was sent before has arrived with the answer.
        count = len(listening.notifies)
        listening.notifies.clear()
        return count

    database.insert()
    assert received() == 1
    database.fill(100)
    assert received() == 1
    database.insert(3)
    assert received() == 3
    aborted = database.connect(autocommit=False)
    aborted.cursor().execute("SELECT 1")
    aborted.cursor().execute(
        "INSERT INTO label (src, uri, cid, val, cts) VALUES ('a', 'b', '', 'c', 'd')"
    )
    aborted.rollback()
    assert received() == 0


#: Statements that PostgreSQL cannot prepare: they are run instead.
UTILITIES = {"listen", "notify", "create_schema_record"}


def test_every_block_prepares(database: TestDatabase, empty_database: TestDatabase) -> None:
    real, empty = database.connect().cursor(), empty_database.connect().cursor()
    for name, text in queries.blocks().items():
        statement, names = numbered(text)
        assert "%" not in statement, f"{name}: psycopg2 would take it for a parameter"
        if name in UTILITIES:
            # The record of migrations is made where there is none yet.
            empty.execute(statement)
            continue
        real.execute(f"PREPARE {name} AS {statement}")
        real.execute(
            "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = %s",
            (name,),
        )
        assert real.fetchall() == [(len(names),)], name
        nulls = f"({', '.join(['NULL'] * len(names))})" if names else ""
        real.execute(f"EXPLAIN EXECUTE {name}{nulls}")
        assert real.fetchall(), name


def numbered(text: str) -> tuple[str, list[str]]:
    """Return a block with PostgreSQL's own parameters, and their names in that order."""
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match["name"] not in names:
            names.append(match["name"])
        return f"${names.index(match['name']) + 1}"

    return re.sub(r"%\((?P<name>\w+)\)s", number, text), names


async def test_absence_that_was_stored_as_false_becomes_absence_where_it_is_signed(
    empty: Database, empty_database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = migrations()
    [at] = [index for index, step in enumerate(known) if step.name == "neg_as_stated"]
    monkeypatch.setattr("sse_labels.database.migrations.migrations", lambda: known[:at])
    await migrate(empty)
    empty_database.insert(1, neg=False, sig=b"s")
    empty_database.insert(1, neg=True, sig=b"s")
    empty_database.insert(1, neg=False)
    monkeypatch.undo()
    await migrate(empty)
    rows = empty_database.execute("SELECT neg FROM label ORDER BY id")
    assert rows == [(None,), (True,), (False,)]
    with pytest.raises(psycopg2.Error, match="append-only"):
        empty_database.execute("UPDATE label SET neg = NULL")


UPSTREAM = "INSERT INTO label_upstream (url, source, cursor) VALUES ('wss://a.example', %s, 1)"


@pytest.mark.parametrize(
    ("upstreams", "own"),
    [
        ([], {"did:web:a", "did:web:b"}),
        (["did:web:b"], {"did:web:a"}),
        (["did:web:b", ""], set()),
    ],
    ids=["nothing was mirrored", "a source was mirrored", "an upstream was mirrored whole"],
)
async def test_what_was_stored_before_is_this_databases_own_unless_it_may_be_mirrored(
    empty: Database,
    empty_database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
    upstreams: list[str],
    own: set[str],
) -> None:
    known = migrations()
    [at] = [index for index, step in enumerate(known) if step.name == "own_sources"]
    monkeypatch.setattr("sse_labels.database.migrations.migrations", lambda: known[:at])
    await migrate(empty)
    empty_database.insert(2, src="did:web:a")
    empty_database.insert(2, src="did:web:b")
    for source in upstreams:
        empty_database.execute(UPSTREAM, (source,))
    monkeypatch.undo()
    await migrate(empty)
    rows = empty_database.execute("SELECT src FROM label_own_source")
    assert sorted(rows) == sorted((src,) for src in own)


async def test_of_what_was_set_aside_before_the_newest_stay_and_all_are_counted(
    empty: Database, empty_database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = migrations()
    [at] = [index for index, step in enumerate(known) if step.name == "set_aside_bounded"]
    monkeypatch.setattr("sse_labels.database.migrations.migrations", lambda: known[:at])
    await migrate(empty)
    empty_database.execute(UPSTREAM, ("",))
    empty_database.execute(
        "INSERT INTO label_set_aside (url, seq, place, reason, label)"
        " SELECT 'wss://a.example', n, 0, 'bad', '' FROM generate_series(1, 1500) AS n"
    )
    monkeypatch.undo()
    await migrate(empty)
    assert empty_database.execute("SELECT set_aside FROM label_upstream") == [(1500,)]
    rows = empty_database.execute("SELECT min(seq), max(seq), count(*) FROM label_set_aside")
    assert rows == [(501, 1500, 1000)]
