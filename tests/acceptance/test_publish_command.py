"""`sse-labels publish`: what is stored is what the lines say, and what went wrong has a number."""

from __future__ import annotations

import json
import os
import pty
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.database import TestDatabase, reachable_directory
from support.program import (
    QUICK_SERVER,
    Program,
    failure,
    free_port,
    ran,
    running,
)

TOKEN = "a-token-for-tests"


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
    large = [label(number, uri=f"at://did:web:{'a' * 8000}.com/{number}") for number in range(600)]
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
        "sse-labels: --publish-token: got None, expected a token, here or as "
        "SSE_LABELS_PUBLISH_TOKEN, or the --data-dir of an embedded server (the token file: got "
        f"'{directory}/publish-token', expected a readable file (No such file or directory))",
    )
    nothing = "nothing was stored before (go on with --from-line 1)"
    assert failure(unknown) == (
        1,
        f"sse-labels: {url}/labels answered 401: this token is not known here; nothing of line 1 "
        f"is stored; {nothing}",
    )
    status, said = failure(nobody)
    assert status == 1
    assert re.fullmatch(
        rf"sse-labels: {away}/labels: .*Connection refused; nothing of lines 1 to 2 is stored; "
        + re.escape(nothing),
        said,
    )
    assert database.stored() == []


def test_answer_that_does_not_come_is_called_uncertain() -> None:
    """A server that takes the request and goes away may have stored the labels."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    run = publish(f"http://127.0.0.1:{server.server_port}", lines(label(0), label(1)))
    thread.join()
    server.server_close()
    status, said = failure(run)
    assert status == 1
    assert "; lines 1 to 2 may or may not be stored: look before sending them again; " in said


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


# The progress bar


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_progress_is_shown_on_a_terminal(url: str, tmp_path: Path, source: str) -> None:
    file = tmp_path / "labels.jsonl"
    text = lines(*map(label, range(40)))
    file.write_text(text)
    terminal, its_end = pty.openpty()
    arguments = ["--url", url, "--publish-token", TOKEN, "--batch=10"]
    env = {"TERM": "xterm"}
    with os.fdopen(its_end, "wb") as stderr:
        if source == "file":
            run = ran("publish", str(file), *arguments, stderr=stderr, env=env)
        else:
            run = ran("publish", *arguments, text=text, stderr=stderr, env=env)
    shown = b""
    try:
        while piece := os.read(terminal, 65536):
            shown += piece
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(terminal)
    assert run.output == "40 labels stored, the last as seq 40\n"
    assert (b"100%" if source == "file" else b"40") in shown
    assert shown.count(b"\r") > 3
