"""The doctor and the database: each fault is made for real, found, and named."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from sse_labels.cli.place import database_at
from sse_labels.config import Settings
from sse_labels.database.queries import migrations
from sse_labels.doctor import Finding, Target, Verdict, examine
from sse_labels.doctor.database_checks import DatabaseChecks, clock_finding

from support.database import OZONE_TABLES, TestDatabase, insert_with, role, until
from support.labeler import labeler, mirroring, wire_label
from support.pgbouncer import pgbouncer

STREAM = ("SELECT ON label, label_stream, sse_labels_migration", "SELECT ON SEQUENCE label_id_seq")
PUBLISH = (
    "INSERT ON label",
    "USAGE ON SEQUENCE label_id_seq",
    "SELECT, INSERT, UPDATE, DELETE ON label_request",
)
READ_ONLY = "ALTER ROLE role_{name} SET default_transaction_read_only = on"
NEWEST = migrations()[-1].number

SUBJECTS = (
    "connection", "schema", "rights", "sequence", "triggers", "notifications",
    "open transactions", "upstreams", "connections left", "durability", "database's clock",
)  # fmt: skip


async def all_found(dsn: str, *, embedded: bool = False, **settings: Any) -> list[Finding]:
    """All findings of a checkup that knows no address."""
    looked_at = Settings(**{"migrate": False, **settings})
    database = database_at(looked_at, dsn)
    target = Target(looked_at, database, embedded, url=None)
    try:
        return [finding async for finding in examine(target)]
    finally:
        database.close()


async def found(dsn: str, subject: str, *, embedded: bool = False, **settings: Any) -> Finding:
    """The one finding of one check."""
    looked_at = Settings(**{"migrate": False, **settings})
    database = database_at(looked_at, dsn)
    try:
        said = await DatabaseChecks(database, looked_at, embedded=embedded).checks()[subject]()
    finally:
        database.close()
    [finding] = [said] if isinstance(said, Finding) else said
    return finding


def expect(finding: Finding, verdict: Verdict, seen: str, do: str) -> None:
    """It has this verdict, and these words in it."""
    assert (finding.verdict, seen in finding.seen, do in finding.do) == (
        verdict, True, True,
    ), finding  # fmt: skip


async def test_a_sound_database_has_no_finding_but_ok(database: TestDatabase) -> None:
    database.insert(3)
    with role(database, *STREAM) as dsn:
        findings = await all_found(dsn)
    others = [finding for finding in findings if finding.verdict is not Verdict.OK]
    # Which files may be open is the machine's; where the server is was not said.
    assert {finding.subject for finding in others} <= {"address", "descriptors"}, others
    assert [finding.subject for finding in findings] == [*SUBJECTS, "descriptors", "address"]


async def test_a_database_that_is_away_fails_once_and_the_rest_is_unchecked() -> None:
    findings = await all_found("host=127.0.0.1 port=1 user=nobody password=secret dbname=none")
    expect(findings[0], Verdict.FAILURE, "Connection refused", "--dsn")
    assert findings[1].verdict is Verdict.UNCHECKED
    assert findings[1].subject == ", ".join(SUBJECTS[1:])
    assert "secret" not in str(findings)


async def test_each_check_of_an_empty_database_stands_for_itself(
    empty_database: TestDatabase,
) -> None:
    all_of_it = await all_found(empty_database.dsn, embedded=True, migrate=True)
    findings = {finding.subject: finding for finding in all_of_it}
    expect(findings["schema"], Verdict.FAILURE, "without a label table", "sse-labels migrate")
    assert findings["sequence"].verdict is Verdict.UNCHECKED
    assert "label" in findings["sequence"].seen
    assert findings["notifications"].verdict is Verdict.OK


class Fault(NamedTuple):
    """What is wrong with a database that has five labels, and what is said of it."""

    subject: str
    verdict: Verdict
    seen: str
    do: str
    sql: str = ""
    #: Of the role that looks; none: it is a superuser.
    grants: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})


FAULTS = {
    "the schema is older": Fault(
        "schema", Verdict.FAILURE, f"version {NEWEST - 1}, this program has {NEWEST}", "migrate",
        f"DELETE FROM sse_labels_migration WHERE number = {NEWEST}",
    ),
    "the schema is newer": Fault(
        "schema", Verdict.FAILURE, "version 99", "a newer sse-labels",
        "INSERT INTO sse_labels_migration (number, name) VALUES (99, 'later')",
    ),
    "the table is another program's": Fault(
        "schema", Verdict.WARNING, "none of what sse-labels keeps", "--no-migrate",
        "DROP TABLE sse_labels_migration",
    ),
    "the record of migrations may not be read": Fault(
        "schema", Verdict.UNCHECKED, "may not read", "GRANT SELECT ON sse_labels_migration",
        grants=("SELECT ON label, label_stream", STREAM[1]),
    ),
    "the sequence has a cache": Fault(
        "schema", Verdict.FAILURE, "CACHE 1", "", "ALTER SEQUENCE label_id_seq CACHE 20"
    ),
    "the role may not read the table": Fault(
        "rights", Verdict.FAILURE, "to stream, the role lacks SELECT on label,", "GRANT SELECT on",
        grants=("SELECT ON label_stream",),
    ),
    "the role may not read the sequence": Fault(
        "rights", Verdict.FAILURE, "to stream, the role lacks SELECT on public.label_id_seq",
        "GRANT SELECT on", grants=("SELECT ON label, label_stream",),
    ),
    "the role may not read the floor": Fault(
        "rights", Verdict.FAILURE, "to stream, the role lacks SELECT on label_stream",
        "GRANT SELECT on", grants=("SELECT ON label", STREAM[1]),
    ),
    "a token is given to publish and the role may not": Fault(
        "rights", Verdict.FAILURE, "to publish, the role lacks INSERT on label, USAGE on",
        "GRANT INSERT", grants=STREAM, settings={"publish_token": "secret"},
    ),
    "a DID is given to sign and the role may not name what is signed": Fault(
        "rights", Verdict.FAILURE, "to sign, the role lacks SELECT on label_own_source",
        "GRANT INSERT on", grants=STREAM, settings={"signing_did": "did:web:a.example"},
    ),
    "old labels are to be deleted and the role may not": Fault(
        "rights", Verdict.FAILURE, "to delete old labels, the role lacks DELETE on label",
        "GRANT DELETE", grants=STREAM, settings={"retention_max_labels": 5},
    ),
    "the role's transactions are read-only, and it publishes": Fault(
        "rights", Verdict.FAILURE, "read_only is on", "RESET", READ_ONLY, (*STREAM, *PUBLISH),
        {"publish_token": "secret"},
    ),
    "the role may publish, and does not": Fault(
        "rights", Verdict.WARNING, "INSERT on label", "REVOKE", READ_ONLY, (*STREAM, *PUBLISH)
    ),
    "the role may do more than is needed": Fault(
        "rights", Verdict.WARNING, "also has INSERT on label, TRUNCATE on label",
        "REVOKE TRUNCATE", grants=(*STREAM, "INSERT, TRUNCATE ON label"),
    ),
    "the role is a superuser": Fault("rights", Verdict.WARNING, "superuser", "a role of its own"),
    "a policy hides rows": Fault(
        "rights", Verdict.FAILURE, "row level security", "DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE label ENABLE ROW LEVEL SECURITY", STREAM,
    ),
    "the sequence stands below the table": Fault(
        "sequence", Verdict.FAILURE, "stands at 2, and the table has 5", "reseed --above 5",
        "SELECT setval('label_id_seq', 2)",
    ),
    "the sequence goes by steps": Fault(
        "sequence", Verdict.FAILURE, "steps of 32", "INCREMENT 1",
        "ALTER SEQUENCE label_id_seq INCREMENT 32",
    ),
    "the sequence starts anew": Fault(
        "sequence", Verdict.FAILURE, "starts anew", "NO CYCLE", "ALTER SEQUENCE label_id_seq CYCLE"
    ),
    "the sequence is nearly used up": Fault(
        "sequence", Verdict.WARNING, "2000000000 of 2147483647", "bigint",
        "ALTER SEQUENCE label_id_seq AS integer; SELECT setval('label_id_seq', 2000000000)",
    ),
    "the sequence may not be read": Fault(
        "sequence", Verdict.UNCHECKED, "may not read it", "GRANT SELECT ON SEQUENCE",
        grants=STREAM[:1],
    ),
    "a trigger is switched off": Fault(
        "triggers", Verdict.WARNING, "label_notify is switched off: labels are found by polling",
        "ENABLE", "ALTER TABLE label DISABLE TRIGGER label_notify",
    ),
    "a trigger is gone": Fault(
        "triggers", Verdict.WARNING, "label_refuse_change is missing: what consumers have read",
        "0001_labels.sql", "DROP TRIGGER label_refuse_change ON label",
    ),
    "a trigger of a later migration is gone": Fault(
        "triggers", Verdict.WARNING, "label_note_source is missing: mirrors may take",
        "0008_own_sources.sql", "DROP TRIGGER label_note_source ON label",
    ),
    "the role has too few connections for a server": Fault(
        "connections left", Verdict.FAILURE, "2 of", "raise max_connections",
        "ALTER ROLE role_{name} CONNECTION LIMIT 3", STREAM, {"workers": 4},
    ),
    "the database has too few connections for a server": Fault(
        "connections left", Verdict.FAILURE, "are free, a server needs up to",
        "raise max_connections",
        "ALTER DATABASE {name} CONNECTION LIMIT 10", STREAM, {"workers": 4},
    ),
    "commits do not wait for the disk": Fault(
        "durability", Verdict.WARNING, "may have forgotten", "synchronous_commit to on",
        "ALTER DATABASE {name} SET synchronous_commit = off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
async def test_what_is_wrong_is_found_and_named(database: TestDatabase, name: str) -> None:
    fault = FAULTS[name]
    database.insert(5)
    looks = role(database, *fault.grants) if fault.grants else nullcontext(database.dsn)
    with looks as dsn:
        if fault.sql:
            database.execute(fault.sql.format(name=database.name))
        finding = await found(dsn, fault.subject, **fault.settings)
    # The comma: what the role lacks may be the last of the sentence.
    expect(finding._replace(seen=finding.seen + ","), fault.verdict, fault.seen, fault.do)
    assert "secret" not in str(finding)


async def test_the_embedded_databases_role_may_be_a_superuser(database: TestDatabase) -> None:
    assert (await found(database.dsn, "rights", embedded=True)).verdict is Verdict.OK


async def test_a_pooler_that_swallows_notifications_is_found(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_labels.doctor.database_checks.NOTIFY_SECONDS", 0.5)
    with pgbouncer(database.dsn) as through:
        assert (await found(through, "connection")).verdict is Verdict.OK
        finding = await found(through, "notifications")
    expect(finding, Verdict.FAILURE, "connection pooler", "the database itself")


class TestOpenTransactions:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sse_labels.doctor.database_checks.HOLD_SECONDS", 0.05)

    async def test_one_that_took_an_id_is_named(self, database: TestDatabase) -> None:
        writer = database.connect(autocommit=False)
        with writer.cursor() as cursor:
            insert_with(lambda sql, row: cursor.execute(sql, row) or cursor.fetchall())
        with role(database, *STREAM) as dsn:
            finding = await found(database.dsn, "open transactions")
            # It sees no ages.
            of_a_reader = await found(dsn, "open transactions")
            writer.rollback()
            afterwards = await found(database.dsn, "open transactions")
            seen = f"session {writer.info.backend_pid} of postgres, idle in transaction"
        expect(finding, Verdict.WARNING, seen, "idle_in_transaction")
        expect(of_a_reader, Verdict.WARNING, "not ended for at least 0.05 s", "commit it")
        assert afterwards.verdict is Verdict.OK

    async def test_a_prepared_one_is_named(self, database: TestDatabase) -> None:
        database.execute("DROP TRIGGER label_notify ON label")
        writer = database.connect(autocommit=False)
        writer.tpc_begin("forgotten")
        with writer.cursor() as cursor:
            insert_with(lambda sql, row: cursor.execute(sql, row) or cursor.fetchall())
        writer.tpc_prepare()
        finding = await found(database.dsn, "open transactions")
        writer.tpc_rollback()
        seen = "prepared transaction 'forgotten' has taken an id"
        expect(finding, Verdict.WARNING, seen, "roll it back")


#: The locks that mirrors hold while they follow.
HELD_LOCKS = (
    "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database())"
)


class TestUpstreams:
    async def test_one_that_nobody_follows_is_a_warning(self, database: TestDatabase) -> None:
        async with labeler() as upstream:
            upstream.add(wire_label())
            async with mirroring(database, upstream.url) as mirror:
                await until(lambda: mirror.cursor == 1)
                expect(await found(database.dsn, "upstreams"), Verdict.OK, "its seq 1,", "")
            # PostgreSQL ends a session, and frees its lock, a moment after the client has left.
            await until(lambda: not database.execute(HELD_LOCKS))
            finding = await found(database.dsn, "upstreams")
        expect(finding, Verdict.WARNING, "nobody follows it", upstream.url)

    async def test_labels_that_were_set_aside_are_a_warning(self, database: TestDatabase) -> None:
        async with labeler() as upstream:
            upstream.add("no label")
            async with mirroring(database, upstream.url) as mirror:
                await until(lambda: mirror.cursor == 1)
                finding = await found(database.dsn, "upstreams")
        expect(finding, Verdict.WARNING, "1 labels were set aside", "aside")


async def test_of_ozones_database_nothing_is_asked_that_it_does_not_have(
    empty_database: TestDatabase,
) -> None:
    empty_database.execute(OZONE_TABLES)
    with role(empty_database, "SELECT ON label") as dsn:
        findings = {finding.subject: finding for finding in await all_found(dsn)}
    bad = [finding for finding in findings.values() if finding.verdict is Verdict.FAILURE]
    assert bad == []
    assert "Ozone's" in findings["schema"].seen


@pytest.mark.parametrize(
    ("ahead", "verdict", "words"),
    [
        (0.01, Verdict.OK, "within 0.5 s"),
        (-1.9, Verdict.OK, "within 1.9 s"),
        (2.4, Verdict.OK, "within 2.4 s"),
        (2.6, Verdict.WARNING, "2.6 s ahead of this machine's"),
        (-9.0, Verdict.WARNING, "9.0 s behind this machine's"),
        (10.6, Verdict.FAILURE, "tokens are refused"),
        (-3600.0, Verdict.FAILURE, "3600.0 s behind"),
    ],
)
def test_a_clock_is_judged_by_what_is_certain(ahead: float, verdict: Verdict, words: str) -> None:
    finding = clock_finding(ahead, precision_seconds=0.5)
    assert finding.verdict is verdict
    assert words in finding.seen
