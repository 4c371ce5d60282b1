"""`sse-labels publish`: what is stored is what the lines say, and what went wrong has a number."""

from __future__ import annotations

import json
import os
import pty
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.database import TestDatabase, reachable_directory
from support.program import (
    PATIENCE_SECONDS,
    QUICK_SERVER,
    Program,
    failure,
    free_port,
    ran,
    running,
)

TOKEN = "a-token-for-tests"

HINT = "give a token that may publish: --publish-token, or SSE_LABELS_PUBLISH_TOKEN"


@pytest.fixture
def url(database: TestDatabase) -> Iterator[str]:
    """A server that may be published to."""
    arguments = ("--dsn", database.dsn, "--publish-token", TOKEN)
    with running("serve", *QUICK_SERVER, *arguments) as server:
        yield server.url()


def label(number: int, **more: Any) -> dict[str, Any]:
    return {
        "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
        "uri": f"at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k{number}",
        "val": "spam",
        "cts": "2026-01-01T00:00:00.000Z",
        **more,
    }


def lines(*labels: dict[str, Any]) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in labels)


def events(*labels: dict[str, Any]) -> list[dict[str, Any]]:
    """The labels as the stream must have them, from seq 1."""
    return [{"seq": seq, "labels": [{"ver": 1, **one}]} for seq, one in enumerate(labels, start=1)]


def publish(url: str, text: str | bytes, *arguments: str, token: str = TOKEN) -> Program:
    env = {"SSE_LABELS_URL": url, "SSE_LABELS_PUBLISH_TOKEN": token}
    return ran("publish", *arguments, text=text, env=env)


# Something between the command and the server


class Visit(BaseHTTPRequestHandler):
    """One request; its connection ends with it."""

    server: Front

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.note(self.headers["Idempotency-Key"])
        act = self.server.acts.pop(0) if self.server.acts else passed
        act(self)

    def forward(self) -> httpx.Response:
        """Let the server do what was asked."""
        names = ("Authorization", "Content-Type", "Idempotency-Key")
        headers = {name: self.headers[name] for name in names}
        return httpx.post(self.server.url + self.path, content=self.body, headers=headers)

    def answer(self, status: int, content: bytes, after: str | None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if after is not None:
            self.send_header("Retry-After", after)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


Act = Callable[[Visit], None]


class Front(HTTPServer):
    """A proxy: the first requests meet `acts`, one each; all others are passed on."""

    def __init__(self, url: str, acts: list[Act], port: int) -> None:
        super().__init__(("127.0.0.1", port), Visit)
        self.url = url
        self.acts = acts
        #: Of each request, in order.
        self.keys: list[str] = []
        self.times: list[float] = []
        self._asked = threading.Condition()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def note(self, key: str) -> None:
        with self._asked:
            self.keys.append(key)
            self.times.append(time.monotonic())
            self._asked.notify_all()

    def wait_until_asked(self) -> None:
        with self._asked:
            assert self._asked.wait_for(lambda: self.keys, PATIENCE_SECONDS)


@contextmanager
def front(url: str, *acts: Act, port: int = 0) -> Iterator[Front]:
    """A proxy before the server at `url`; when the block is left, connections are refused."""
    with Front(url, list(acts), port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            # Returns when the request that is under way has been answered.
            proxy.shutdown()
            thread.join()


def passed(visit: Visit) -> None:
    """What a proxy is for."""
    answer = visit.forward()
    visit.answer(answer.status_code, answer.content, answer.headers.get("Retry-After"))


def lost(visit: Visit) -> None:
    """The server stores the labels, and the connection ends before its answer."""
    visit.forward()


def half(visit: Visit) -> None:
    """The server stores the labels, and the connection ends within its answer."""
    visit.forward()
    visit.wfile.write(b'HTTP/1.1 201 Created\r\nContent-Length: 14\r\n\r\n{"seqs":[')


def stored_but_504(visit: Visit) -> None:
    """The server stores the labels, and the proxy did not wait for it."""
    visit.forward()
    visit.answer(504, b"<html>", None)


def refused(status: int, after: str | None = None) -> Act:
    """The server is not asked."""
    return lambda visit: visit.answer(status, b'{"error":"Name","message":"a reason"}', after)


UNCERTAIN = "lines {} to {} may or may not be stored: look before sending them again"


# What goes in


def test_lines_of_a_file_and_of_standard_input_are_stored_in_order(
    database: TestDatabase, url: str, tmp_path: Path
) -> None:
    labels = [label(number, val=f"wert-ä-{number}") for number in range(7)]
    file = tmp_path / "labels.jsonl"
    # As a Windows editor leaves it: a byte order mark, CRLF, an empty line, no end to the last.
    text = "\ufeff" + lines(*labels[:4]).replace("\n", "\r\n") + "\r\n" + lines(labels[4]).rstrip()
    file.write_bytes(text.encode())
    from_file = ran(
        "publish",
        str(file),
        "--url",
        f"{url}/",
        "--batch=2",
        env={"SSE_LABELS_PUBLISH_TOKEN": TOKEN},
    )
    from_input = publish(url, lines(*labels[5:]), "-")
    nothing = publish(url, "\n \n")
    assert from_file.output == "5 labels stored, the last as seq 5\n"
    assert from_input.output == "2 labels stored, the last as seq 7\n"
    assert nothing.output == "0 labels stored\n"
    for run in (from_file, from_input, nothing):
        assert (run.process.returncode, run.errors) == (0, "")
    assert database.stored() == events(*labels)


def test_many_lines_and_large_ones_keep_to_the_servers_body_limit(
    database: TestDatabase, url: str
) -> None:
    small = [label(number) for number in range(20_000)]
    # 500 of these are 4 MB; the limit is 1 MiB.
    large = [label(number, uri=f"https://{'a' * 8000}.com/{number}") for number in range(600)]
    run = publish(url, lines(*small, *large))
    assert run.errors == ""
    assert run.output == "20600 labels stored, the last as seq 20600\n"
    assert database.stored() == events(*small, *large)


def test_each_line_of_a_slow_producer_is_sent_when_its_batch_is_full(
    database: TestDatabase, url: str
) -> None:
    read, write = os.pipe()
    arguments = ("publish", "--batch=1", "--url", url, "--publish-token", TOKEN)
    with os.fdopen(read) as pipe, running(*arguments, stdin=pipe) as run:
        for number in range(3):
            os.write(write, lines(label(number)).encode())
            with running("tail", f"{url}/stream?cursor={number}") as tail:
                tail.wait_until(lambda tail=tail: len(tail.out) == 1)
        os.close(write)
        assert run.wait() == 0
    assert database.stored() == events(*map(label, range(3)))


# What goes wrong


def test_bad_line_is_named_across_batches_and_empty_lines(database: TestDatabase, url: str) -> None:
    good = [label(number) for number in range(8)]
    # Batches of two: lines 2 and 3, 4 and 6, 7 and 8. Line 8 is the bad one.
    text = f"\n{lines(*good[:3])}\n{lines(*good[3:5])}%s\n{lines(*good[5:])}"
    cases = [
        ('{"src":', "line 8: not JSON: Expecting value, column 8; nothing of its batch is stored"),
        ('{"val":"\udcff"}', "line 8: not UTF-8: invalid start byte, byte 9; nothing of its batch"),
        (json.dumps(label(9, cts="today")), "line 8: cts: got 'today', expected"),
        (json.dumps(label(9, nag=True)), "line 8: nag: "),
        (json.dumps([label(9)]), "line 8: got "),
    ]
    for bad, message in cases:
        run = publish(url, (text % bad).encode(errors="surrogateescape"), "--batch=2")
        status, said = failure(run)
        assert said.startswith(f"sse-labels: {message}")
        assert said.endswith("; 4 labels stored before, up to line 6 (go on with --from-line 7)")
        assert status == 1
    # Mended, and gone on with from there.
    rest = publish(url, text % json.dumps(good[7]), "--batch=2", "--from-line=7")
    assert rest.output == "5 labels stored, the last as seq 25\n"
    assert database.stored() == events(*good[:4] * 5, good[4], good[7], *good[5:])


def test_line_that_is_too_long_is_named_and_not_read_whole(
    database: TestDatabase, url: str
) -> None:
    endless = lines(label(0)) + '{"src":"' + "a" * 3_000_000
    status, said = failure(publish(url, endless, "--batch=1"))
    assert status == 1
    assert said == (
        "sse-labels: line 2: got more than 1048563 bytes, expected one label; nothing of its batch "
        "is stored; 1 label stored before, up to line 1 (go on with --from-line 2)"
    )
    assert database.stored() == events(label(0))


def test_batch_over_the_servers_limit_is_explained(database: TestDatabase) -> None:
    arguments = ("--dsn", database.dsn, "--publish-token", TOKEN, "--body-max-bytes=2KiB")
    with running("serve", *QUICK_SERVER, *arguments) as server:
        many = lines(*map(label, range(50)))
        status, said = failure(publish(server.url(), many))
        smaller = publish(server.url(), many, "--batch-bytes=2KiB")
    assert status == 1
    assert "/labels answered 413: " in said
    assert "(a smaller --batch or --batch-bytes?); nothing of lines 1 to 50 is stored" in said
    assert smaller.output == "50 labels stored, the last as seq 50\n"
    assert database.stored() == events(*map(label, range(50)))


def test_who_may_not_publish_and_where_nobody_answers(database: TestDatabase, url: str) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    with reachable_directory() as directory:
        no_token = ran("publish", "--url", url, "--data-dir", str(directory), text="{}")
    unknown = publish(url, lines(label(0)), token="another")
    nobody = publish(away, lines(label(0), label(1)))
    assert failure(no_token) == (
        2,
        "sse-labels: --publish-token: not given, expected a token, here or as "
        "SSE_LABELS_PUBLISH_TOKEN, or the --data-dir of an embedded server or a demo, "
        "which prints it (the token file: got "
        f"'{directory}/publish-token', expected a readable file (No such file or directory))",
    )
    nothing = "nothing was stored before (go on with --from-line 1)"
    assert failure(unknown) == (
        1,
        f"sse-labels: {url}/labels answered 401: this token is not known here ({HINT}); nothing of "
        f"line 1 is stored; {nothing}",
    )
    status, said = failure(nobody)
    assert status == 1
    assert re.fullmatch(
        rf"sse-labels: {away}/labels: .*Connection refused; nothing of lines 1 to 2 is stored; "
        + re.escape(nothing),
        said,
    )
    assert database.stored() == []


# What is sent again


def test_batch_whose_answer_is_lost_is_stored_once(database: TestDatabase, url: str) -> None:
    labels = [label(number) for number in range(8)]
    with front(url, lost, passed, half, passed, stored_but_504) as proxy:
        run = publish(proxy.address, lines(*labels), "--batch=2")
        first, second, third, fourth = proxy.keys[::2][:3] + proxy.keys[-1:]
        assert proxy.keys == [first, first, second, second, third, third, fourth]
        # The user publishes again, and gets what a publish is.
        again = publish(proxy.address, lines(labels[0]))
    assert len({first, second, third, fourth, proxy.keys[-1]}) == 5
    assert all(re.fullmatch('"[!#-~]{20,250}"', key) for key in proxy.keys)
    assert (run.process.returncode, run.output) == (0, "8 labels stored, the last as seq 8\n")
    assert again.output == "1 label stored, the last as seq 9\n"
    # A line for each that was in doubt, and none for the others.
    for number, line in zip((1, 3, 5), run.err, strict=True):
        assert line.startswith(f"sse-labels: {proxy.address}/labels")
        assert line.endswith(
            f"; sending lines {number} to {number + 1} again for up to 60 s, with the same "
            "Idempotency-Key: a server that knows this header stores nothing twice"
        )
    assert "/labels answered 504: Gateway Timeout; sending" in run.err[2]
    assert database.stored() == events(*labels, labels[0])


def test_server_that_is_away_for_a_while_is_said_once_and_waited_for(
    database: TestDatabase, url: str
) -> None:
    labels = [label(number) for number in range(4)]
    acts = (refused(503), refused(502), passed, refused(408), passed)
    with front(url, *acts) as proxy:
        run = publish(proxy.address, lines(*labels), "--batch=2")
    assert [proxy.keys.count(key) for key in dict.fromkeys(proxy.keys)] == [3, 2]
    assert run.output == "4 labels stored, the last as seq 4\n"
    away, slow = run.err
    assert away.startswith(
        f"sse-labels: {proxy.address}/labels answered 503: a reason; sending lines 1 to 2 again "
    )
    # The 4xx said that nothing was stored.
    assert slow == (
        f"sse-labels: {proxy.address}/labels answered 408: a reason; sending lines 3 to 4 again "
        "for up to 60 s"
    )
    assert database.stored() == events(*labels)


def test_restart_of_the_server_is_waited_for_once_it_was_there(
    database: TestDatabase, url: str
) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as pipe, ExitStack() as stack:
        with front(url) as proxy:
            arguments = ("--batch=1", "--url", proxy.address, "--publish-token", TOKEN)
            program = stack.enter_context(running("publish", *arguments, stdin=pipe))
            os.write(write, lines(label(0)).encode())
            proxy.wait_until_asked()
        os.write(write, lines(label(1)).encode())
        program.wait_for("Connection refused; sending line 2 again for up to 60 s$")
        with front(url, port=proxy.server_port):
            os.close(write)
            assert program.wait() == 0
    assert len(program.err) == 1
    assert program.output == "2 labels stored, the last as seq 2\n"
    assert database.stored() == events(label(0), label(1))


def test_giving_up_says_what_is_stored_and_what_is_uncertain(
    database: TestDatabase, url: str
) -> None:
    labels = [label(number) for number in range(6)]
    with front(url, passed, lost, *[refused(503)] * 50) as proxy:
        run = publish(proxy.address, lines(*labels), "--batch=2", "--retry-seconds=0.3")
        assert len(proxy.keys) >= 3
    assert run.process.returncode == 1
    assert run.out == []
    [waiting, said] = run.err
    assert "; sending lines 3 to 4 again for up to 0.3 s, with the same " in waiting
    assert re.fullmatch(
        re.escape(
            f"sse-labels: {proxy.address}/labels answered 503: a reason; given up after "
            f"SECONDS s; {UNCERTAIN.format(3, 4)}; 2 labels stored before, up to line 2 "
            "(go on with --from-line 3)"
        ).replace("SECONDS", r"\d+\.\d"),
        said,
    )
    # Whoever looks finds them stored, and goes on behind them.
    assert database.stored() == events(*labels[:4])
    publish(url, lines(*labels), "--from-line=5")
    assert database.stored() == events(*labels)


def test_without_retry_seconds_nothing_is_sent_again(database: TestDatabase, url: str) -> None:
    two = lines(label(0), label(1))
    with front(url, lost, refused(503, "1"), refused(429, "1")) as proxy:
        runs = [publish(proxy.address, two, "--retry-seconds=0") for _ in range(3)]
        assert len(set(proxy.keys)) == len(proxy.keys) == 3
    before = "nothing was stored before (go on with --from-line 1)"
    for run, outcome in zip(
        runs,
        [
            f".*; {UNCERTAIN.format(1, 2)}",
            f" answered 503: a reason; {UNCERTAIN.format(1, 2)}",
            " answered 429: a reason; nothing of lines 1 to 2 is stored",
        ],
        strict=True,
    ):
        assert len(run.err) == 1
        expected = rf"sse-labels: {proxy.address}/labels{outcome}; {re.escape(before)}"
        assert re.fullmatch(expected, failure(run)[1])
    assert database.stored() == events(label(0), label(1))


def test_rate_of_the_server_is_kept_by_its_retry_after(database: TestDatabase) -> None:
    labels = [label(number) for number in range(4)]
    arguments = ("--dsn", database.dsn, "--publish-token", TOKEN)
    rate = ("--publish-rate-labels=2", "--publish-burst-labels=2")
    with (
        running("serve", *QUICK_SERVER, *arguments, *rate) as server,
        front(server.url()) as proxy,
    ):
        run = publish(proxy.address, lines(*labels), "--batch=2")
    assert run.output == "4 labels stored, the last as seq 4\n"
    first, second = dict.fromkeys(proxy.keys)
    assert proxy.keys == [first, second, second]
    assert proxy.times[2] - proxy.times[1] >= 1
    [said] = run.err
    assert "/labels answered 429: " in said
    assert database.stored() == events(*labels)


def test_rate_is_said_once_however_often_it_is_met(database: TestDatabase, url: str) -> None:
    labels = [label(number) for number in range(3)]
    with front(url, refused(429, "0"), passed, refused(429), lost, refused(429)) as proxy:
        run = publish(proxy.address, lines(*labels), "--batch=1")
    assert run.output == "3 labels stored, the last as seq 3\n"
    rate, outage = run.err
    assert rate == (
        f"sse-labels: {proxy.address}/labels answered 429: a reason; sending line 1 again for up "
        "to 60 s"
    )
    assert "; sending line 2 again for up to 60 s, with the same Idempotency-Key" in outage
    assert database.stored() == events(*labels)


@pytest.mark.parametrize("after", ["61", "9" * 400, "Wed, 01 Jan 2200 00:00:00 GMT"])
def test_wait_beyond_retry_seconds_is_not_begun(after: str) -> None:
    with front("", refused(429, after)) as proxy:
        run = publish(proxy.address, lines(label(0), label(1)))
    assert len(run.err) == len(proxy.keys) == 1
    status, said = failure(run)
    assert status == 1
    assert re.fullmatch(
        rf"sse-labels: {proxy.address}/labels answered 429: a reason; given up after "
        r"0\.0 s: it asks to wait \S+ s more; nothing of lines 1 to 2 is stored; nothing was "
        r"stored before \(go on with --from-line 1\)",
        said,
    )


def test_retry_after_that_has_passed_or_cannot_be_read_asks_for_nothing(
    database: TestDatabase, url: str
) -> None:
    hints = ["Wed, 21 Oct 2015 07:28:00 GMT", "soon"]
    with front(url, refused(503, hints[0]), passed, refused(503, hints[1])) as proxy:
        run = publish(proxy.address, lines(label(0), label(1)), "--batch=1")
    assert run.output == "2 labels stored, the last as seq 2\n"
    assert database.stored() == events(label(0), label(1))


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422, 500])
def test_final_answer_is_not_asked_for_again(status: int) -> None:
    with front("", refused(status, "0")) as proxy:
        run = publish(proxy.address, lines(label(0), label(1)))
    assert len(run.err) == len(proxy.keys) == 1
    nothing = "nothing of lines 1 to 2 is stored"
    assert f"; {nothing if status < 500 else UNCERTAIN.format(1, 2)}; " in failure(run)[1]


def test_refusal_says_nothing_about_an_earlier_try(database: TestDatabase, url: str) -> None:
    """The token was taken back meanwhile; the labels were stored before that."""
    with front(url, lost, refused(401)) as proxy:
        run = publish(proxy.address, lines(label(0), label(1)))
        assert len(proxy.keys) == 2
    assert f"answered 401: a reason ({HINT}); {UNCERTAIN.format(1, 2)}; " in failure(run)[1]
    assert database.stored() == events(label(0), label(1))


def test_201_of_something_else_is_called_uncertain() -> None:
    def created(visit: Visit) -> None:
        visit.answer(201, b'{"seqs":[1]}', None)

    with front("", created, refused(201)) as proxy:
        runs = [publish(proxy.address, lines(label(0), label(1))) for _ in range(2)]
        assert len(proxy.keys) == 2
    for run in runs:
        said = f"answered 201 without a seq for each label; {UNCERTAIN.format(1, 2)}; "
        assert said in failure(run)[1]


# Ctrl-C


def test_ctrl_c_says_what_was_stored(database: TestDatabase, url: str) -> None:
    read, write = os.pipe()
    arguments = ("publish", "--batch=2", "--url", url, "--publish-token", TOKEN)
    with os.fdopen(read) as pipe, running(*arguments, stdin=pipe) as run:
        os.write(write, lines(*map(label, range(3))).encode())
        with running("tail", f"{url}/stream?cursor=0") as tail:
            tail.wait_until(lambda: len(tail.out) == 2)
        run.press_ctrl_c()
        assert run.wait() == 130
        os.close(write)
    assert [line for line in run.err if line] == [
        "sse-labels: interrupted; 2 labels stored before, up to line 2"
    ]
    assert database.stored() == events(label(0), label(1))


@pytest.mark.parametrize(
    ("act", "where"),
    [(refused(503, "59"), f"; {UNCERTAIN.format(1, 2)}"), (refused(429, "59"), "")],
    ids=["uncertain", "refused"],
)
def test_ctrl_c_ends_a_wait_at_once(tmp_path: Path, act: Act, where: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(lines(label(0), label(1)))
    with front("", act) as proxy:
        arguments = ("--url", proxy.address, "--publish-token", TOKEN)
        with running("publish", str(file), *arguments) as run:
            run.wait_for("a reason; sending")
            run.press_ctrl_c()
            # It has less patience than the server asks for.
            assert run.wait() == 130
    assert [line for line in run.err if line][1:] == [
        f"sse-labels: interrupted; nothing was stored before{where}"
    ]


# The progress bar


def test_progress_of_a_file_is_shown_on_a_terminal(url: str, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(lines(*map(label, range(40))))
    terminal, its_end = pty.openpty()
    arguments = ["--url", url, "--publish-token", TOKEN, "--batch=10"]
    with os.fdopen(its_end, "wb") as stderr:
        run = ran("publish", str(file), *arguments, stderr=stderr, env={"TERM": "xterm"})
    shown = b""
    try:
        while piece := os.read(terminal, 65536):
            shown += piece
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(terminal)
    assert run.output == "40 labels stored, the last as seq 40\n"
    assert b"100%" in shown
    assert shown.count(b"\r") > 3
