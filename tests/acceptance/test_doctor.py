"""`sse-labels doctor` as it is typed: its lines, its JSON, its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.database import TestDatabase, reachable_directory
from support.program import QUICK_SERVER, ran, running


def test_it_finds_the_embedded_database_of_a_server_that_runs(tmp_path: Path) -> None:
    with reachable_directory() as directory:
        where = ("--data-dir", str(directory / "data"))
        idle = ran("doctor", *where)
        with running("serve", *where, *QUICK_SERVER, "--heartbeat-seconds", "0.3") as server:
            url = server.url()
            done = ran("doctor", url, *where, "--publish-as", "did:web:labeler.example")
            told = ran("doctor", f"{url}/stream?values=spam", *where, "--json")
    assert "unchecked  database: no --dsn, and no embedded PostgreSQL runs\n" in idle.output
    assert idle.process.returncode == 0
    lines = done.output.splitlines()
    assert lines[0].startswith("ok         connection: PostgreSQL ")
    assert any(line.startswith("ok         a label's way: a label took") for line in lines)
    assert lines[-1].endswith(" 0 failure, 2 unchecked")
    assert (done.process.returncode, done.errors) == (0, "")
    report = json.loads(told.output)
    assert set(report) == {"findings", "counts"}
    assert set(report["findings"][0]) == {"verdict", "subject", "seen", "do"}
    assert sum(report["counts"].values()) == len(report["findings"])
    assert [each["verdict"] for each in report["findings"] if each["subject"] == "address"] == [
        "ok"
    ]


def test_a_failure_is_exit_status_1_and_says_what_to_do(database: TestDatabase) -> None:
    database.execute("ALTER SEQUENCE label_id_seq CACHE 20")
    done = ran("doctor", "--dsn", database.dsn)
    assert done.process.returncode == 1
    [line] = [line for line in done.output.splitlines() if line.startswith("failure")]
    assert line.startswith("failure    schema: the cache of sequence public.label_id_seq: got 20")
    assert "           → " in done.output


def test_a_warning_is_not_a_failure(database: TestDatabase) -> None:
    done = ran("doctor", "--dsn", database.dsn)
    assert "warning    rights: the role is a superuser" in done.output
    assert done.process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ftp://labels.example",), "URL: got 'ftp://labels.example', expected an address such as"),
        (("--publish-as", "alice"), "--publish-as: got 'alice', expected a DID"),
        (("--dsn", "no://dsn"), "--dsn: got '(not shown)'"),
    ],
)
def test_what_is_asked_wrongly_is_exit_status_2(arguments: tuple[str, ...], words: str) -> None:
    done = ran("doctor", *arguments)
    assert done.process.returncode == 2
    assert words in done.errors
    assert done.output == ""
