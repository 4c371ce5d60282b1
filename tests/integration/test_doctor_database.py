"""The doctor and the database: each fault is made for real, found, and named."""

from __future__ import annotations

from typing import Any

import pytest

from sse_labels.config import Settings
from sse_labels.database import Database
from sse_labels.doctor import Finding, Patient, Verdict, examine
from sse_labels.doctor.database_checks import DatabaseChecks, clock_finding
from sse_labels.queries import migrations

from support.database import OZONE_TABLES, TestDatabase, insert_with, role, until
from support.labeler import labeler, mirroring, wire_label
from support.pgbouncer import pgbouncer

STREAM = ("SELECT ON label, label_stream, sse_labels_migration", "SELECT ON SEQUENCE label_id_seq")

SUBJECTS = (
    "connection", "schema", "rights", "sequence", "triggers", "notifications",
    "open transactions", "upstreams", "connections left", "durability", "database's clock",
)  # fmt: skip


PUBLISH = (
    "INSERT ON label",
    "USAGE ON SEQUENCE label_id_seq",
    "SELECT, INSERT, UPDATE, DELETE ON label_request",
)


async def found(dsn: str, subject: str, *, embedded: bool = False, **settings: Any) -> Finding:
    """The one finding of one check."""
    [finding] = await all_found(dsn, subject, embedded=embedded, **settings)
    assert finding.subject == subject
    return finding


async def all_found(dsn: str, subject: str, *, embedded: bool = False, **settings: Any) -> Any:
    """All findings of one check."""
    database = Database(dsn, connect_timeout_seconds=5, query_timeout_seconds=5, max_connections=1)
    try:
        checks = DatabaseChecks(
            database, Settings(**{"migrate": False, **settings}), embedded=embedded
        )
        return await checks.checks()[subject]()
    finally:
        database.close()


def warned(finding: Finding, seen: str, do: str) -> None:
    """It is a warning with these words in it."""
    assert (finding.verdict, seen in finding.seen, do in finding.do) == (
        Verdict.WARNING, True, True,
    ), finding  # fmt: skip


def failed(finding: Finding, seen: str, do: str) -> None:
    """It is a failure with these words in it."""
    assert (finding.verdict, seen in finding.seen, do in finding.do) == (
        Verdict.FAILURE, True, True,
    ), finding  # fmt: skip


async def test_a_sound_database_has_no_finding_but_ok(database: TestDatabase) -> None:
    database.insert(3)
    with role(database, *STREAM) as dsn:
        patient = Patient(Settings(migrate=False), dsn, embedded=False, url=None)
        findings = [finding async for finding in examine(patient)]
    others = [finding for finding in findings if finding.verdict is not Verdict.OK]
    # Which files may be open is the machine's; where the server is was not said.
    assert {finding.subject for finding in others} <= {"address", "descriptors"}, others
    assert [finding.subject for finding in findings] == [*SUBJECTS, "descriptors", "address"]


async def test_a_database_that_is_away_fails_once_and_the_rest_is_unchecked() -> None:
    dsn = "host=127.0.0.1 port=1 user=nobody password=secret dbname=none"
    patient = Patient(Settings(), dsn, embedded=False, url=None)
    findings = [finding async for finding in examine(patient)]
    failed(findings[0], "Connection refused", "--dsn")
    assert findings[1].verdict is Verdict.UNCHECKED
    assert "notifications" in findings[1].subject
    assert "secret" not in str(findings)


async def test_each_check_of_an_empty_database_stands_for_itself(
    empty_database: TestDatabase,
) -> None:
    patient = Patient(Settings(), empty_database.dsn, embedded=True, url=None)
    findings = {finding.subject: finding async for finding in examine(patient)}
    failed(findings["schema"], "without a label table", "sse-labels migrate")
    assert findings["sequence"].verdict is Verdict.UNCHECKED
    assert "label" in findings["sequence"].seen
    assert findings["notifications"].verdict is Verdict.OK


class TestSchema:
    async def test_an_older_schema_fails(self, database: TestDatabase) -> None:
        newest = migrations()[-1].number
        database.execute("DELETE FROM sse_labels_migration WHERE number = %s", (newest,))
        seen = f"version {newest - 1}, this program has {newest}"
        failed(await found(database.dsn, "schema"), seen, "migrate")

    async def test_a_newer_schema_fails(self, database: TestDatabase) -> None:
        database.execute("INSERT INTO sse_labels_migration (number, name) VALUES (99, 'later')")
        failed(await found(database.dsn, "schema"), "version 99", "a newer sse-labels")

    async def test_a_table_of_another_program_is_a_warning(self, database: TestDatabase) -> None:
        database.execute("DROP TABLE sse_labels_migration")
        warned(await found(database.dsn, "schema"), "none of what sse-labels keeps", "--no-migrate")

    async def test_a_record_that_may_not_be_read_is_unchecked(self, database: TestDatabase) -> None:
        grants = ("SELECT ON label, label_stream", "SELECT ON SEQUENCE label_id_seq")
        with role(database, *grants) as dsn:
            finding = await found(dsn, "schema")
        assert finding.verdict is Verdict.UNCHECKED
        assert "GRANT SELECT ON sse_labels_migration" in finding.do

    async def test_a_sequence_with_a_cache_fails(self, database: TestDatabase) -> None:
        database.execute("ALTER SEQUENCE label_id_seq CACHE 20")
        failed(await found(database.dsn, "schema"), "CACHE 1", "")


class TestRights:
    @pytest.mark.parametrize(
        ("grants", "missing"),
        [
            (("SELECT ON label_stream",), "SELECT on label,"),
            (("SELECT ON label, label_stream",), "SELECT on public.label_id_seq"),
            ((STREAM[1], "SELECT ON label"), "SELECT on label_stream"),
        ],
    )
    async def test_what_a_stream_needs_and_lacks_fails(
        self, database: TestDatabase, grants: tuple[str, ...], missing: str
    ) -> None:
        with role(database, *grants) as dsn:
            finding = await found(dsn, "rights")
        assert missing in finding.seen + ","
        failed(finding, "to stream, the role lacks", "GRANT SELECT on")

    async def test_rights_to_publish_are_asked_for_where_a_token_is(
        self, database: TestDatabase
    ) -> None:
        with role(database, *STREAM) as dsn:
            finding = await found(dsn, "rights", publish_token="secret")
        failed(finding, "to publish, the role lacks INSERT on label, USAGE on", "GRANT INSERT")
        assert "secret" not in str(finding)

    async def test_rights_to_name_what_is_signed_are_asked_for_where_a_did_is(
        self, database: TestDatabase
    ) -> None:
        with role(database, *STREAM) as dsn:
            finding = await found(dsn, "rights", signing_did="did:web:a.example")
        failed(finding, "to sign, the role lacks SELECT on label_own_source", "GRANT INSERT on")

    async def test_rights_to_delete_are_asked_for_where_retention_is(
        self, database: TestDatabase
    ) -> None:
        with role(database, *STREAM) as dsn:
            finding = await found(dsn, "rights", retention_max_labels=5)
        failed(finding, "to delete old labels, the role lacks DELETE on label", "GRANT DELETE")

    async def test_a_role_whose_transactions_are_read_only_cannot_publish(
        self, database: TestDatabase
    ) -> None:
        with role(database, *STREAM, *PUBLISH) as dsn:
            database.execute(
                f"ALTER ROLE role_{database.name} SET default_transaction_read_only = on"
            )
            failed(await found(dsn, "rights", publish_token="secret"), "read_only is on", "RESET")
            assert (await found(dsn, "rights")).verdict is Verdict.WARNING

    async def test_more_than_is_needed_is_a_warning(self, database: TestDatabase) -> None:
        with role(database, *STREAM, "INSERT, TRUNCATE ON label") as dsn:
            finding = await found(dsn, "rights")
        warned(finding, "also has INSERT on label, TRUNCATE on label", "REVOKE TRUNCATE")

    async def test_a_superuser_is_a_warning(self, database: TestDatabase) -> None:
        warned(await found(database.dsn, "rights"), "superuser", "a role of its own")

    async def test_the_embedded_ones_role_is_not(self, database: TestDatabase) -> None:
        assert (await found(database.dsn, "rights", embedded=True)).verdict is Verdict.OK

    async def test_rows_that_a_policy_hides_fail(self, database: TestDatabase) -> None:
        database.execute("ALTER TABLE label ENABLE ROW LEVEL SECURITY")
        with role(database, *STREAM) as dsn:
            failed(await found(dsn, "rights"), "row level security", "DISABLE ROW LEVEL SECURITY")


class TestSequence:
    async def test_one_that_stands_below_the_table_fails(self, database: TestDatabase) -> None:
        database.insert(5)
        database.execute("SELECT setval('label_id_seq', 2)")
        finding = await found(database.dsn, "sequence")
        failed(finding, "stands at 2, and the table has 5", "reseed --above 5")

    async def test_one_with_steps_fails(self, database: TestDatabase) -> None:
        database.execute("ALTER SEQUENCE label_id_seq INCREMENT 32")
        failed(await found(database.dsn, "sequence"), "steps of 32", "INCREMENT 1")

    async def test_one_that_starts_anew_fails(self, database: TestDatabase) -> None:
        database.execute("ALTER SEQUENCE label_id_seq CYCLE")
        failed(await found(database.dsn, "sequence"), "starts anew", "NO CYCLE")

    async def test_one_that_is_nearly_used_up_is_a_warning(self, database: TestDatabase) -> None:
        database.execute("ALTER SEQUENCE label_id_seq AS integer")
        database.execute("SELECT setval('label_id_seq', 2000000000)")
        warned(await found(database.dsn, "sequence"), "2000000000 of 2147483647", "bigint")

    async def test_one_that_may_not_be_read_is_unchecked(self, database: TestDatabase) -> None:
        database.insert()
        with role(database, STREAM[0]) as dsn:
            finding = await found(dsn, "sequence")
        assert finding.verdict is Verdict.UNCHECKED
        assert "GRANT SELECT ON SEQUENCE" in finding.do


class TestTriggers:
    async def test_one_that_is_switched_off_is_a_warning(self, database: TestDatabase) -> None:
        database.execute("ALTER TABLE label DISABLE TRIGGER label_notify")
        finding = await found(database.dsn, "triggers")
        warned(finding, "label_notify is switched off: labels are found by polling", "ENABLE")

    async def test_one_that_is_gone_is_a_warning(self, database: TestDatabase) -> None:
        database.execute("DROP TRIGGER label_refuse_change ON label")
        finding = await found(database.dsn, "triggers")
        warned(finding, "label_refuse_change is missing: what consumers have read", "0001_labels")


class TestNotifications:
    async def test_a_pooler_that_swallows_them_is_found(
        self, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sse_labels.doctor.database_checks.NOTIFY_SECONDS", 0.5)
        with pgbouncer(database.dsn) as through:
            assert (await found(through, "connection")).verdict is Verdict.OK
            failed(
                await found(through, "notifications"), "connection pooler", "the database itself"
            )


class TestOpenTransactions:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sse_labels.doctor.database_checks.HOLD_SECONDS", 0.05)

    async def test_one_that_took_an_id_is_named(self, database: TestDatabase) -> None:
        writer = database.connect(autocommit=False)
        with writer.cursor() as cursor:
            insert_with(lambda sql, row: cursor.execute(sql, row) or cursor.fetchall())
        finding = await found(database.dsn, "open transactions")
        pid = writer.get_backend_pid()
        warned(finding, f"session {pid} of postgres, idle in transaction", "idle_in_transaction")
        writer.rollback()
        assert (await found(database.dsn, "open transactions")).verdict is Verdict.OK

    async def test_a_prepared_one_is_named(self, database: TestDatabase) -> None:
        database.execute("DROP TRIGGER label_notify ON label")
        writer = database.connect(autocommit=False)
        writer.tpc_begin("forgotten")
        with writer.cursor() as cursor:
            insert_with(lambda sql, row: cursor.execute(sql, row) or cursor.fetchall())
        writer.tpc_prepare()
        finding = await found(database.dsn, "open transactions")
        warned(finding, "prepared transaction 'forgotten' has taken an id", "roll it back")
        writer.tpc_rollback()

    async def test_a_reader_who_sees_no_ages_is_told_what_it_saw(
        self, database: TestDatabase
    ) -> None:
        writer = database.connect(autocommit=False)
        with writer.cursor() as cursor:
            insert_with(lambda sql, row: cursor.execute(sql, row) or cursor.fetchall())
        with role(database, *STREAM) as dsn:
            finding = await found(dsn, "open transactions")
            writer.rollback()
        warned(finding, "not ended for at least 0.05 s", "commit it")


class TestUpstreams:
    async def test_one_that_nobody_follows_is_a_warning(self, database: TestDatabase) -> None:
        async with labeler() as upstream:
            upstream.add(wire_label())
            async with mirroring(database, upstream.url) as mirror:
                await until(lambda: mirror.cursor == 1)
                finding = await found(database.dsn, "upstreams")
                assert (finding.verdict, "its seq 1," in finding.seen) == (Verdict.OK, True)
            warned(await found(database.dsn, "upstreams"), "nobody follows it", upstream.url)

    async def test_labels_that_were_set_aside_are_a_warning(self, database: TestDatabase) -> None:
        async with labeler() as upstream:
            upstream.add("no label")
            async with mirroring(database, upstream.url) as mirror:
                await until(lambda: mirror.cursor == 1)
                warned(await found(database.dsn, "upstreams"), "1 labels were set aside", "aside")


async def test_of_ozones_database_nothing_is_asked_that_it_does_not_have(
    empty_database: TestDatabase,
) -> None:
    empty_database.execute(OZONE_TABLES)
    with role(empty_database, "SELECT ON label") as dsn:
        patient = Patient(Settings(migrate=False), dsn, embedded=False, url=None)
        findings = {finding.subject: finding async for finding in examine(patient)}
    bad = [finding for finding in findings.values() if finding.verdict is Verdict.FAILURE]
    assert bad == []
    assert "Ozone's" in findings["schema"].seen


async def test_too_few_connections_for_a_server_fail(database: TestDatabase) -> None:
    with role(database, *STREAM) as dsn:
        database.execute(f"ALTER ROLE role_{database.name} CONNECTION LIMIT 3")
        finding = await found(dsn, "connections left", workers=4)
    failed(finding, "2 of", "raise max_connections")


async def test_commits_that_do_not_wait_for_the_disk_are_a_warning(database: TestDatabase) -> None:
    database.execute(f"ALTER DATABASE {database.name} SET synchronous_commit = off")
    warned(
        await found(database.dsn, "durability"), "may have forgotten", "synchronous_commit to on"
    )


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
    finding = clock_finding("a clock", ahead, precision_seconds=0.5)
    assert finding.verdict is verdict
    assert words in finding.seen
