"""`sse-labels tail`: what it writes equals the table, whatever happens to it or to the server."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import jwt
import pytest

from support.database import TestDatabase
from support.program import (
    PATIENCE_SECONDS,
    QUICK_SERVER,
    Program,
    called_all,
    command,
    environment,
    failure,
    free_port,
    ran,
    ran_all,
    running,
)

EVENTS = 4000


def events_of(*runs: Program) -> list[dict[str, Any]]:
    """What was written, over several runs."""
    return [json.loads(line) for run in runs for line in run.out]


@contextmanager
def serving(database: TestDatabase, *more: str) -> Iterator[str]:
    """A server on the database; the value is its address."""
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn, *more) as server:
        yield server.url()


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def scripted(answer: Callable[[int, Any], Answer]) -> Iterator[str]:
    """A server that answers request number n, from 0, with `answer(n, headers)` and closes."""
    numbers = iter(range(1_000_000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(next(numbers), self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/stream"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


STREAM = {"Content-Type": "text/event-stream", "Sse-Labels-Head": "0"}


# Until the head


def test_until_head_writes_the_table_and_ends(database: TestDatabase) -> None:
    database.fill(30)
    with serving(database) as url:
        everything, after, address_alone, hidden, from_now = ran_all(
            [
                (("tail", f"{url}/stream", "--cursor=0", "--until-head"), {}),
                (("tail", f"{url}/stream?cursor=25", "--until-head"), {}),
                (
                    ("tail",),
                    {
                        "SSE_LABELS_URL": f"{url}/",
                        "SSE_LABELS_CURSOR": "0",
                        "SSE_LABELS_UNTIL_HEAD": "true",
                    },
                ),
                # Of the last label's value there is none else after seq 27.
                (("tail", f"{url}/stream?values=spam&values=rude&cursor=0", "--until-head"), {}),
                (("tail", f"{url}/stream", "--until-head"), {}),
            ]
        )
    stored = database.stored()
    assert events_of(everything) == stored
    assert events_of(after) == stored[25:]
    assert events_of(address_alone) == stored
    filter = [event for event in stored if event["labels"][0]["val"] in ("spam", "rude")]
    assert events_of(hidden) == filter
    assert stored[-1] not in filter or filter[-1] == stored[-1]
    assert from_now.out == []
    for run in (everything, after, address_alone, hidden, from_now):
        assert run.process.returncode == 0
        assert run.err == []


def test_until_head_ends_when_the_newest_label_is_hidden_or_there_is_none(
    database: TestDatabase,
) -> None:
    with serving(database) as url:
        empty = ran("tail", f"{url}/stream?cursor=0", "--until-head")
        database.insert(2, val="spam")
        database.insert(1, val="rude")
        hidden = ran("tail", f"{url}/stream?cursor=0&values=spam", "--until-head")
    assert (empty.process.returncode, empty.out, empty.err) == (0, [], [])
    assert (hidden.process.returncode, hidden.err) == (0, [])
    assert events_of(hidden) == database.stored()[:2]


# Across runs


def test_state_continues_where_the_run_before_ended(database: TestDatabase, tmp_path: Path) -> None:
    state = tmp_path / "cursor"
    runs = []
    with serving(database) as url:
        for count in (5, 0, 7):
            database.insert(count)
            # Once the file has a cursor, --cursor is for the first run only.
            runs.append(ran("tail", url, "--cursor=2", "--until-head", "--state", str(state)))
    assert [len(run.out) for run in runs] == [3, 0, 7]
    assert events_of(*runs) == database.stored(after=2)
    assert state.read_text() == f"{12:019d}\n"


def test_runs_that_are_told_to_end_write_each_event_once(
    database: TestDatabase, tmp_path: Path
) -> None:
    database.fill(EVENTS)
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
    runs = interrupted_runs(database, tmp_path / "cursor", numbers)
    assert events_of(*runs) == database.stored()


def test_killed_runs_lose_nothing_and_repeat_at_most_one_event(
    database: TestDatabase, tmp_path: Path
) -> None:
    database.fill(EVENTS)
    runs = interrupted_runs(database, tmp_path / "cursor", [signal.SIGKILL] * 4)
    received: list[dict[str, Any]] = []
    for run in runs:
        events = events_of(run)
        if received and events and events[0] == received[-1]:
            del events[0]
        received += events
    assert received == database.stored()


def interrupted_runs(
    database: TestDatabase, state: Path, numbers: list[signal.Signals]
) -> list[Program]:
    """Read the table by runs that are ended in the middle, and a last one that is not."""
    arguments = ("--cursor=0", "--until-head", "--state", str(state))
    runs: list[Program] = []
    with serving(database) as url:
        for part, number in enumerate(numbers, start=1):
            with running("tail", url, *arguments) as run:
                have = sum(len(one.out) for one in runs)
                enough = EVENTS * part // (len(numbers) + 1) - have
                run.wait_until(lambda run=run, enough=enough: len(run.out) >= enough)
                status = run.end(number)
            assert status == (130 if number == signal.SIGINT else -number)
            assert "".join(run.err).strip() == ""
            runs.append(run)
        runs.append(ran("tail", url, *arguments))
    assert runs[-1].process.returncode == 0
    assert len(runs[-1].out) > 0
    return runs


def test_state_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt"
    corrupt.write_text("12\n13\n")
    locked = tmp_path / "locked"
    calls = [
        (("tail", "--state", str(corrupt)), {}),
        (("tail",), {"SSE_LABELS_STATE": str(locked)}),
        (("tail", "--state", str(tmp_path / "no" / "folder")), {}),
    ]
    with locked.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = called_all(calls)
    expected = [
        f"--state: got '{corrupt}', expected a file with one cursor in it, or a new one",
        f"SSE_LABELS_STATE: got '{locked}', expected a file that no other tail uses",
        f"--state: got '{tmp_path}/no/folder', expected a file to write to (No such file or "
        "directory)",
    ]
    assert [failure(run) for run in ended] == [(2, f"sse-labels: {text}") for text in expected]
    assert corrupt.read_text() == "12\n13\n"


# Lost connections


def test_server_killed_and_started_again_is_followed_on(database: TestDatabase) -> None:
    arguments = ("serve", *QUICK_SERVER, f"--port={free_port()}", "--dsn", database.dsn)
    with running(*arguments) as server:
        url = server.url()
        with running("tail", url, "--cursor=0") as tail:
            database.insert(3)
            tail.wait_until(lambda: len(tail.out) >= 3)
            server.end(signal.SIGKILL)
            tail.wait_for(r"reconnecting after seq 3 in \d\.\d s")
            database.insert(3)
            with running(*arguments) as again:
                tail.wait_until(lambda: len(tail.out) >= 6)
                database.insert(3)
                tail.wait_until(lambda: len(tail.out) >= 9)
                assert again.end() == 0
            tail.wait_for("the server ended the stream: .*ServerStopping")
            assert tail.end(signal.SIGINT) == 130
    assert events_of(tail) == database.stored()
    assert "Traceback" not in tail.errors


def test_temporary_answer_is_tried_again_with_the_last_event_id() -> None:
    asked: list[str | None] = []

    def answer(number: int, headers: Any) -> Answer:
        asked.append(headers["Last-Event-ID"])
        match number:
            case 0:
                problem = b'{"error":"NotReady","message":"the database is away"}'
                return 503, {"Retry-After": "0"}, problem
            case 1:
                # The last one is cut off before its empty line: it does not count.
                blocks = b'id: 4\n\nid: 5\ndata: {"seq":5}\n\nid: 6\ndata: {"se'
                return 200, {**STREAM, "Sse-Labels-Head": "6"}, blocks
            case _:
                return 200, STREAM, b'id: 5\n\nid: 6\ndata: {"seq":6}\n\n'

    with scripted(answer) as url:
        run = ran("tail", url, "--until-head")
    assert run.process.returncode == 0
    assert run.out == ['{"seq":5}', '{"seq":6}']
    assert asked == [None, None, "5"]
    assert "answered 503, NotReady: the database is away" in run.errors


def test_full_server_is_asked_again_from_where_it_said(tmp_path: Path) -> None:
    asked: list[str | None] = []
    full = b'retry: 10\nid: 4\nevent: error\ndata: {"error":"TooManyConnections","cursor":4}\n\n'

    def answer(number: int, headers: Any) -> Answer:
        asked.append(headers["Last-Event-ID"])
        if number == 0:
            # No head: a full server opens no stream, nor does a proxy without a server.
            return 200, {"Content-Type": "text/event-stream"}, full
        body = b'id: 4\nevent: info\ndata: {"name":"StreamOpened"}\n\nid: 5\ndata: {"seq":5}\n\n'
        return 200, {**STREAM, "Sse-Labels-Head": "5"}, body

    state = tmp_path / "state"
    with scripted(answer) as url:
        run = ran("tail", url, "--until-head", "--state", str(state))
    assert run.process.returncode == 0, run.errors
    assert run.out == ['{"seq":5}']
    assert asked == [None, "4"]
    said = "the server ended the stream: TooManyConnections; reconnecting after seq 4 in "
    assert said in run.errors


@pytest.mark.parametrize("name", ["FutureCursor", "EpochChanged"])
def test_stream_that_ends_because_its_seqs_are_others_is_not_asked_again(name: str) -> None:
    body = b'id: 7\ndata: {"seq":7}\n\nevent: error\ndata: {"error":"%s"}\n\n' % name.encode()
    with scripted(lambda number, headers: (200, STREAM, body)) as url:
        run = ran("tail", url, "--cursor=6")
    assert (run.process.returncode, run.out) == (1, ['{"seq":7}'])
    assert run.err == [f"sse-labels: the server ended the stream: {name}"]


def test_server_that_closes_at_once_is_asked_ever_more_rarely() -> None:
    """The server's hint is the least; without an event the wait grows all the same."""
    with (
        scripted(lambda number, headers: (200, STREAM, b"retry: 100\n\nid: 7\n\n")) as url,
        running("tail", url, "--cursor=7") as tail,
    ):
        tail.wait_until(lambda: len(tail.err) >= 3)
        tail.end()
    waits = [float(re.findall(r"in (\d+\.\d) s", line)[0]) for line in tail.err]
    for wait, (low, high) in zip(waits, [(0.3, 0.6), (0.6, 1.1), (1.1, 2.1)], strict=False):
        assert low <= wait <= high


def test_server_that_sends_events_is_asked_again_soon() -> None:
    def answer(number: int, headers: Any) -> Answer:
        seq = int(headers["Last-Event-ID"]) + 1
        return 200, STREAM, b'id: %d\ndata: {"seq":%d}\n\n' % (seq, seq)

    with scripted(answer) as url, running("tail", url, "--cursor=7") as tail:
        tail.wait_until(lambda: len(tail.err) >= 4)
        tail.end()
    assert [event["seq"] for event in events_of(tail)][:4] == [8, 9, 10, 11]
    waits = [float(re.findall(r"in (\d+\.\d) s", line)[0]) for line in tail.err]
    assert max(waits) <= 0.5


# Refusals


def test_refused_request_ends_with_the_servers_message(database: TestDatabase) -> None:
    with serving(database) as url:
        bad, future, missing, no_stream = called_all(
            [
                (("tail", f"{url}/stream?sources=nobody"), {}),
                (("tail", url, "--cursor=99"), {}),
                (("tail", f"{url}/elsewhere"), {}),
                (("tail", f"{url}/health/live"), {}),
            ]
        )
    for run, message in (
        (bad, "answered 400, InvalidRequest: sources: "),
        (future, "answered 400, FutureCursor: cursor 99 is beyond the newest seq, which is 0"),
        (missing, "/elsewhere answered 404, NotFound: "),
        (no_stream, "/health/live is no event stream: "),
    ):
        status, said = failure(run)
        assert message in said
        assert status == 1
        assert len(run.err) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"id: abc\ndata: {}\n\n", "is no stream of labels: event id 'abc'"),
        (b"id: 8\ndata: {}\n\nid: 8\ndata: {}\n\n", "the server went back: seq 8 came after 8"),
    ],
)
def test_stream_that_breaks_the_order_is_not_followed(body: bytes, message: str) -> None:
    with scripted(lambda number, headers: (200, STREAM, body)) as url:
        run = ran("tail", url, "--cursor=7")
    assert run.process.returncode == 1
    assert message in run.err[-1]
    assert len(run.out) <= 1


# The end


def test_ctrl_c_ends_quietly_also_while_it_waits(database: TestDatabase) -> None:
    database.insert(1)
    with serving(database) as url, running("tail", url, "--cursor=0") as tail:
        tail.wait_until(lambda: len(tail.out) == 1)
        tail.press_ctrl_c()
        assert tail.wait() == 130
    assert "".join(tail.err).strip() == ""
    with running("tail", f"http://127.0.0.1:{free_port()}/stream") as tail:
        tail.wait_for("Connection refused; reconnecting from now in ")
        tail.press_ctrl_c()
        assert tail.wait() == 130
    assert "Traceback" not in tail.errors


@pytest.mark.parametrize("count", [EVENTS, 1])
def test_reader_that_has_enough_ends_it_quietly(database: TestDatabase, count: int) -> None:
    """`| head -1`: with more to write, and with nothing more to write than heartbeats."""
    database.fill(count)
    with serving(database, "--heartbeat-seconds=0.2") as url:
        tail = subprocess.Popen(
            [*command(), "tail", url, "--cursor=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        with tail:
            head = subprocess.run(
                ["head", "-1"], stdin=tail.stdout, capture_output=True, check=True
            )
            tail.stdout.close()
            errors = tail.stderr.read()
            assert tail.wait(PATIENCE_SECONDS) == 128 + signal.SIGPIPE
    assert json.loads(head.stdout) == database.stored()[0]
    assert errors == b""


def test_seqs_of_a_run_increase_also_while_labels_are_written(database: TestDatabase) -> None:
    with serving(database) as url, running("tail", url) as tail:
        # A tail without a cursor says nothing when it has connected: ask until something comes.
        while not tail.out:
            database.insert(1)
        database.fill(500)
        newest = database.stored()[-1]["seq"]
        tail.wait_until(lambda: bool(tail.out) and json.loads(tail.out[-1])["seq"] == newest)
        tail.end()
    events = events_of(tail)
    assert all(before["seq"] < after["seq"] for before, after in pairwise(events))
    assert events == database.stored(after=events[0]["seq"] - 1)


def test_protected_stream_is_read_with_a_token_that_no_message_shows(
    database: TestDatabase,
) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    now = int(time.time())
    token = jwt.encode({"iat": now, "exp": now + 60}, secret, "HS256")
    database.insert(3)
    arguments = ("serve", *QUICK_SERVER, "--dsn", database.dsn)
    with running(*arguments, env=environment(SSE_LABELS_JWT_SECRET=secret)) as server:
        url = server.wait_for(r"(http://\S+)")[1]
        asked = ("tail", url, "--cursor=0", "--until-head")
        read, refused, in_url = ran_all(
            [
                (asked, {"SSE_LABELS_TOKEN": token}),
                (asked, {}),
                (("tail", f"{url}/stream?access_token={token}x"), {}),
            ]
        )
    assert [json.loads(line) for line in read.out] == database.stored()
    for run in (refused, in_url):
        status, said = failure(run)
        assert (status, "answered 401, AuthRequired" in said) == (1, True)
        assert "--token, or SSE_LABELS_TOKEN)" in said
        assert token not in said


def test_a_password_in_the_address_is_shown_by_no_message(database: TestDatabase) -> None:
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn) as server:
        address = server.url().replace("http://", "http://me:secret@")
        run = ran("tail", f"{address}/elsewhere")
    status, said = failure(run)
    assert (status, "/elsewhere answered 404" in said) == (1, True)
    assert "secret" not in run.errors


def test_a_host_that_can_be_none_is_refused_by_name() -> None:
    status, said = failure(ran("tail", "http://a..example/"))
    assert (status, "expected an address such as" in said) == (2, True)
