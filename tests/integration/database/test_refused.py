"""The database says no: each time it is named, and nobody is told to try again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from psycopg2.extensions import make_dsn

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.errors import DatabaseRefused

from support.clock import Clock, at
from support.database import TestDatabase, role, until
from support.labeler import labeler, mirroring, wire_label
from support.program import failure, ran, running
from support.reading import PATIENCE_SECONDS, reading
from support.server import LABEL, PUBLISH_TOKEN, QUICK, Gate, RunServer, Server

READ = (
    "SELECT ON label, label_stream, sse_labels_migration",
    "SELECT ON SEQUENCE label_id_seq",
)
PUBLISH = (
    *READ,
    "INSERT ON label",
    "USAGE ON SEQUENCE label_id_seq",
    "SELECT, INSERT, UPDATE, DELETE ON label_request",
)


async def publish(server: Server, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.url, verify=False) as client:
        return await client.post(
            "/labels",
            json={"labels": [{**LABEL, **fields}]},
            headers={"Authorization": f"Bearer {PUBLISH_TOKEN}", "Idempotency-Key": "once"},
        )


def refused(answer: httpx.Response, status: int, name: str) -> str:
    """The message of an answer that does not ask anybody to come back."""
    assert (answer.status_code, answer.json()["error"]) == (status, name)
    assert "Retry-After" not in answer.headers
    message = str(answer.json()["message"])
    assert "again" not in message
    return message


async def ends(serving: Any) -> DatabaseRefused:
    """The one error that a server ends with."""
    with pytest.raises((DatabaseRefused, BaseExceptionGroup)) as caught:
        async with serving:
            await asyncio.Event().wait()
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DatabaseRefused)
    return error


# A right


async def test_a_server_that_may_not_read_labels_does_not_start(database: TestDatabase) -> None:
    with role(database, "SELECT ON label_stream") as dsn:
        async with asyncio.timeout(20):
            error = await ends(App(Settings(**QUICK), dsn, None).running())
    assert str(error) == (
        "the database refuses: permission denied for table label: GRANT SELECT ON label TO "
        f"role_{database.name}"
    )


async def test_a_server_that_may_not_see_the_floor_does_not_start(database: TestDatabase) -> None:
    database.fill(3)
    # It would pass over what was deleted and tell nobody.
    database.execute("UPDATE label_stream SET floor = 3")
    database.execute("DELETE FROM label WHERE id < 3")
    with role(database, "SELECT ON label", "SELECT ON SEQUENCE label_id_seq") as dsn:
        async with asyncio.timeout(20):
            error = await ends(App(Settings(**QUICK), dsn, None).running())
    assert str(error) == (
        "the database refuses: permission denied for table label_stream: GRANT SELECT ON "
        f"label_stream TO role_{database.name}"
    )


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_server_whose_right_is_taken_away_says_so_once_and_ends(
    database: TestDatabase, workers: int
) -> None:
    database.fill(3)
    with (
        role(database, *READ) as dsn,
        running(
            "serve", "--port=0", "--poll-seconds=0.1", "--no-migrate", f"--workers={workers}",
            "--dsn", dsn,
        ) as server,
    ):  # fmt: skip
        url = await asyncio.to_thread(server.url)
        async with reading(f"{url}/stream", cursor=0) as reader:
            await reader.until_events(3)
            database.execute(f"REVOKE SELECT ON label FROM role_{database.name}")
            assert await asyncio.to_thread(server.wait) == 1
            await reader.until_closed()
    assert reader.news[-1][0] == "error"
    remedy = f"permission denied for table label: GRANT SELECT ON label TO role_{database.name}"
    assert server.err[-1] == f"sse-labels: the database refuses: {remedy}"
    stops = [line for line in server.err if "the sequencer stops" in line]
    assert 1 <= len(stops) <= workers
    assert "is away" not in server.errors
    assert "Traceback" not in server.errors


@pytest.mark.parametrize(
    ("taken", "granted"),
    [
        ("INSERT ON label", "GRANT INSERT ON label"),
        ("USAGE ON SEQUENCE label_id_seq", "GRANT USAGE ON public.label_id_seq"),
        ("SELECT ON label_request", "GRANT SELECT ON label_request"),
        (
            "SELECT, INSERT, UPDATE, DELETE ON label_request",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON label_request",
        ),
    ],
)
async def test_a_right_to_publish_that_is_taken_away_is_named_in_the_log(
    database: TestDatabase,
    run_server: RunServer,
    taken: str,
    granted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with role(database, *PUBLISH) as dsn:
        name = f"role_{database.name}"
        async with run_server(dsn) as server:
            database.execute(f"REVOKE {taken} FROM {name}")
            message = refused(await publish(server), 403, "Forbidden")
            assert name not in message
            assert f"{granted} TO {name}" in caplog.text
            assert server.app.feed.sequencer.following
            database.execute(f"GRANT {taken} TO {name}")
            assert (await publish(server)).status_code == 201
    assert len(database.stored()) == 1


async def test_whoever_asks_meanwhile_is_not_told_to_try_again(
    database: TestDatabase,
    run_server: RunServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database.fill(3)
    name = f"role_{database.name}"
    with role(database, *READ) as dsn:
        async with (
            run_server(dsn) as server,
            httpx.AsyncClient(base_url=server.url, verify=False) as client,
        ):
            # The sequencer, which would end the server, does not look meanwhile.
            gate = Gate()
            monkeypatch.setattr(
                server.app.feed.store, "rows_after", gate.before(server.app.feed.store.rows_after)
            )
            server.app.feed.sequencer.wake()
            await gate.reached.wait()
            database.execute(f"REVOKE SELECT ON label FROM {name}")
            query = "/xrpc/com.atproto.label.queryLabels?uriPatterns=*"
            assert name not in refused(await client.get(query), 500, "DatabaseRefused")
            assert f"GRANT SELECT ON label TO {name}" in caplog.text
            assert server.app.metrics.requests_refused == {"DatabaseRefused": 1}
            # History that is not in the ring.
            for query in ({"cursor": 0}, {"cursor": 0, "snapshot": "active"}):
                async with reading(server.stream_url, **query) as stream:
                    await stream.until_closed()
                assert stream.events == []
                [(event, said)] = stream.news
                assert (event, said["error"], said["cursor"]) == ("error", "HistoryRefused", 0)
                assert name not in said["message"]
            assert server.app.metrics.streams_ended["HistoryRefused"] == 2
            database.execute(f"GRANT SELECT ON label TO {name}")
            async with reading(server.stream_url, cursor=0) as stream:
                assert await stream.until_events(3) == database.stored()
    # Anybody causes these lines: they are limited.
    caused_by = causes(caplog)
    assert caused_by["the database refuses a request"] == "127.0.0.1"
    assert caused_by["a backfill is refused"] == "backfills"


def causes(caplog: pytest.LogCaptureFixture) -> dict[str, str | None]:
    return {
        str(record.msg).partition(":")[0]: getattr(record, "caused_by", None)
        for record in caplog.records
    }


async def test_expiries_that_may_not_be_read_end_the_stream(
    server: Server,
    database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock(server)
    database.insert(1, exp=at(1))

    async def refuses(*_: Any) -> None:
        raise DatabaseRefused("the database refuses: permission denied for table label")

    monkeypatch.setattr(server.app.expiry, "_page", refuses)
    clock.set(2)
    async with reading(server.stream_url, expired=at(0)) as stream:
        await stream.until_closed()
    assert stream.news[-1][1]["error"] == "HistoryRefused"
    assert causes(caplog)["expiries may not be read"] == "expiries"


async def test_labels_that_a_policy_hides_are_not_skipped(database: TestDatabase) -> None:
    database.fill(3)
    with role(database, *READ) as dsn:
        database.execute("ALTER TABLE label ENABLE ROW LEVEL SECURITY")
        database.execute("CREATE POLICY half ON label USING (id % 2 = 0)")
        async with asyncio.timeout(20):
            error = await ends(App(Settings(**QUICK), dsn, None).running())
    assert "row-level security" in str(error)


def test_a_migration_that_may_not_make_tables_says_who_may(empty_database: TestDatabase) -> None:
    empty_database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with role(empty_database) as dsn:
        status, said = failure(ran("migrate", "--dsn", dsn))
        assert status == 1
        assert f"GRANT CREATE ON SCHEMA public TO role_{empty_database.name}" in said
        assert empty_database.execute("SELECT to_regclass('label')") == [(None,)]


# A value, a constraint, a trigger

RAISES = """
CREATE FUNCTION no_spam() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'no % here', NEW.val USING HINT = 'Ask the moderators.';
END $$;
CREATE TRIGGER no_spam BEFORE INSERT ON label FOR EACH ROW WHEN (NEW.val = 'spam')
    EXECUTE FUNCTION no_spam()
"""


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (RAISES, "no spam here (Ask the moderators.)"),
        (RAISES.replace("USING HINT", "USING ERRCODE = 'LB001', HINT"), "no spam here"),
        ("ALTER TABLE label ADD CONSTRAINT no_spam CHECK (val <> 'spam')", '"no_spam"'),
        ("ALTER TABLE label ALTER val TYPE varchar(3)", "too long for type character varying(3)"),
        ("CREATE UNIQUE INDEX once ON label (uri); INSERT INTO label (src, uri, cid, val, cts)"
         f" VALUES ('x', '{LABEL['uri']}', '', 'x', 'x')", '"once"'),
        ("ALTER TABLE label ALTER cid DROP NOT NULL, ADD CONSTRAINT of_cid CHECK (cid <> '')",
         '"of_cid"'),
        ("ALTER SEQUENCE label_id_seq MAXVALUE 5; SELECT setval('label_id_seq', 5)", "maximum"),
    ],
)  # fmt: skip
async def test_labels_that_the_database_does_not_take_are_refused_in_its_words(
    server: Server, database: TestDatabase, made: str, words: str
) -> None:
    database.execute(made)
    before = database.stored()
    message = refused(await publish(server), 422, "LabelsRefused")
    assert words in message
    assert server.app.metrics.requests_refused == {"LabelsRefused": 1}
    assert server.app.metrics.count["labels_refused"] == 1
    assert server.app.feed.sequencer.following
    assert database.stored() == before


async def test_other_labels_are_stored_after_one_was_refused(
    server: Server, database: TestDatabase
) -> None:
    database.execute(RAISES)
    async with reading(server.stream_url, cursor=0) as stream:
        for val, status in (("spam", 422), ("rude", 201), ("spam", 422)):
            assert (await publish(server, val=val, uri=f"https://x/{val}")).status_code == status
        assert await stream.until_events(1) == database.stored()


def test_the_publish_command_shows_what_the_database_said(database: TestDatabase) -> None:
    database.execute(RAISES)
    with running(
        "serve", "--port=0", "--dsn", database.dsn, env={"SSE_LABELS_PUBLISH_TOKEN": "t" * 20}
    ) as server:
        program = ran(
            "publish", "--url", server.url(), "-",
            text=httpx.Request("POST", "http://x", json=LABEL).content + b"\n",
            env={"SSE_LABELS_PUBLISH_TOKEN": "t" * 20},
        )  # fmt: skip
    assert program.process.returncode == 1
    assert "no spam here (Ask the moderators.)" in program.err[-1]
    assert database.stored() == []


async def test_retention_that_is_refused_is_logged_and_streams_go_on(
    run_server: RunServer, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    database.execute(RAISES.replace("BEFORE INSERT", "BEFORE DELETE").replace("NEW", "OLD"))
    database.insert(5)
    async with run_server(retention_max_labels=1, retention_sweep_seconds=0.05) as server:
        await until(lambda: caplog.text.count("nothing was deleted: error=") >= 2)
        assert "no spam here" in caplog.text
        [level] = {r.levelno for r in caplog.records if "nothing was deleted" in r.message}
        assert level == logging.ERROR
        async with reading(server.stream_url, cursor=3) as stream:
            database.insert(1)
            await stream.until_seq(6)
    assert len(database.stored()) == 6


async def test_a_mirror_waits_when_its_labels_are_refused_and_goes_on_when_they_are_taken(
    database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    database.execute(RAISES)
    async with labeler() as upstream:
        upstream.add(wire_label(1, val="spam"))
        async with mirroring(database, upstream.url) as mirror:
            await until(lambda: "takes no labels of this upstream" in caplog.text)
            assert "no spam here" in caplog.text
            assert mirror.cursor == 0
            database.execute("DROP TRIGGER no_spam ON label")
            await until(lambda: len(database.stored()) == 1)


async def test_a_mirror_whose_right_is_taken_away_ends_with_its_name(
    database: TestDatabase,
) -> None:
    rights = (f"ALL ON ALL {each} IN SCHEMA public" for each in ("TABLES", "SEQUENCES"))
    with role(database, *rights) as dsn:
        async with labeler() as upstream:
            upstream.add(wire_label(1))
            options = ("--any-source", "--no-migrate", "--dsn", dsn)
            with running("mirror", upstream.url, *options) as program:
                await until(lambda: len(database.stored()) == 1)
                database.execute(f"REVOKE INSERT ON label FROM role_{database.name}")
                upstream.add(wire_label(2))
                assert await asyncio.to_thread(program.wait) == 1
    assert "permission denied for table label: GRANT INSERT ON label TO" in program.err[-1]
    assert "Traceback" not in program.errors
    assert len(database.stored()) == 1


# A session


async def test_a_database_that_takes_no_writes_for_now_is_waited_for(
    database: TestDatabase, run_server: RunServer
) -> None:
    with role(database, *PUBLISH) as dsn:
        name = f"role_{database.name}"
        database.execute(f"ALTER ROLE {name} SET default_transaction_read_only = on")
        async with run_server(dsn) as server:
            answer = await publish(server)
            assert (answer.status_code, answer.json()["error"]) == (503, "NotReady")
            assert int(answer.headers["Retry-After"]) > 0
            database.execute(f"ALTER ROLE {name} RESET default_transaction_read_only")
            # The pool may hold several sessions that began read-only; each refuses once.
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (answer := await publish(server)).status_code == 503:
                    pass
            assert answer.status_code == 201
            async with reading(server.stream_url, cursor=0) as stream:
                assert await stream.until_events(1) == database.stored()


async def test_a_start_that_is_refused_at_the_door_ends_with_the_servers_words(
    database: TestDatabase,
) -> None:
    for change, words in (
        ({"user": "nobody_here"}, 'role "nobody_here" does not exist'),
        ({"dbname": "nothing_here"}, 'database "nothing_here" does not exist'),
    ):
        program = await asyncio.to_thread(
            ran, "serve", "--port=0", "--dsn", make_dsn(database.dsn, **change)
        )
        status, said = failure(program)
        assert status == 1
        assert words in said
        assert "is away" not in program.errors


async def test_a_role_that_may_not_log_in_for_a_while_is_waited_for(
    database: TestDatabase, run_server: RunServer, caplog: pytest.LogCaptureFixture
) -> None:
    with role(database, *READ) as dsn:
        name = f"role_{database.name}"
        async with run_server(dsn) as server, reading(server.stream_url) as stream:
            await stream.until_opened()
            # As while a password is changed, at one place before the other.
            database.execute(f"ALTER ROLE {name} NOLOGIN")
            database.terminate(database.backends())
            await until(lambda: not server.app.feed.sequencer.following)
            await until(lambda: "is not permitted to log in" in caplog.text)
            database.insert(2)
            database.execute(f"ALTER ROLE {name} LOGIN")
            assert await stream.until_events(2) == database.stored()
