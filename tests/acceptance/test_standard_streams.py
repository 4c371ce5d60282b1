"""Standard streams that are full, closed or broken: every command says so, and servers serve."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from support.database import TestDatabase, reachable_directory
from support.program import PATIENCE_SECONDS, QUICK_SERVER, command, environment, free_port, running

LABELS = 30
LABEL = {
    "src": "did:web:labeler.example",
    "uri": "did:web:account.example",
    "val": "spam",
    "cts": "2026-01-01T00:00:00Z",
}
STATES = ("full", "closed", "broken")
#: What is said of standard output, and the exit status.
LOST = {
    "full": (1, "standard output: No space left on device"),
    "closed": (1, "standard output: Bad file descriptor"),
    "broken": (141, None),
}
#: What each command has done when its last line cannot be written; None: nothing that lasts.
COMMANDS: dict[str, tuple[Callable[[str, str, Path], Sequence[str]], str | None]] = {
    "--help": (lambda url, dsn, folder: ["--help"], None),
    "--version": (lambda url, dsn, folder: ["--version"], None),
    "tail": (lambda url, dsn, folder: ["tail", url, "--cursor=0", "--until-head"], None),
    "verify": (lambda url, dsn, folder: ["verify", url], None),
    "verify --json": (lambda url, dsn, folder: ["verify", url, "--json"], None),
    "doctor": (lambda url, dsn, folder: ["doctor", "--dsn", dsn], None),
    "doctor --json": (lambda url, dsn, folder: ["doctor", "--dsn", dsn, "--json"], None),
    "token": (
        lambda url, dsn, folder: ["token", "name", f"--publish-tokens-file={folder / 'tokens'}"],
        None,
    ),
    "publish": (
        lambda url, dsn, folder: ["publish", str(folder / "labels"), "--url", url],
        f"1 label stored, the last as seq {LABELS + 1}",
    ),
    "migrate": (lambda url, dsn, folder: ["migrate", "--dsn", dsn], "schema version "),
    "reseed": (
        lambda url, dsn, folder: ["reseed", "--dsn", dsn, "--above=1000", "--force"],
        "the next seq is 1001",
    ),
}


@contextlib.contextmanager
def stream_in(state: str) -> Iterator[tuple[int | None, str]]:
    """A stream in one of the states: its descriptor, or how a shell closes one."""
    if state == "full":
        with Path("/dev/full").open("wb") as full:
            yield full.fileno(), ""
    elif state == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        yield writer, ""
        os.close(writer)
    else:
        yield None, "{}>&-"


def start(
    arguments: Sequence[str], env: dict[str, str], **states: str
) -> tuple[subprocess.Popen[bytes], contextlib.ExitStack]:
    """Start the program with `stdin`, `stdout`, `stderr` in these states, or "open"."""
    with contextlib.ExitStack() as stack:
        given: dict[str, int | None] = {"stdin": subprocess.DEVNULL}
        closing = ""
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            state = states.get(name, "open")
            if state == "open":
                given.setdefault(name, subprocess.PIPE)
            else:
                given[name], form = stack.enter_context(stream_in(state))
                closing += " " + form.format(number)
        shell = ["sh", "-c", f'exec "$@" {closing}', "sh"] if closing.strip() else []
        process = subprocess.Popen(
            [*shell, *command(), *arguments], env=environment(**env), cwd="/", **given
        )
        return process, stack.pop_all()


def run(arguments: Sequence[str], env: dict[str, str], **states: str) -> tuple[int, str, str]:
    """Run it to its end; return the exit status, what it wrote, and its messages."""
    process, stack = start(arguments, env, **states)
    with stack:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert b"Traceback" not in (err or b""), err
    return process.returncode, (out or b"").decode(), (err or b"").decode()


PUBLISHER = {"SSE_LABELS_PUBLISH_TOKEN": "a-token-for-tests"}
#: Commands that ask a server; for the others none is started.
ASKING = ("tail", "verify", "verify --json", "publish")
#: Commands whose output is lost in every state. A closed one differs in the words alone.
IN_EVERY_STATE = ("--help", "tail", "publish")

Place = tuple[str, str, Path]


@contextlib.contextmanager
def placed(database: TestDatabase, folder: Path, *, server: bool = True) -> Iterator[Place]:
    """The address of a server, its database, and a folder with a label to publish."""
    database.fill(LABELS)
    (folder / "labels").write_text(json.dumps(LABEL))
    with contextlib.ExitStack() as stack:
        url = ""
        if server:
            serve = ("serve", *QUICK_SERVER, "--dsn", database.dsn)
            url = stack.enter_context(running(*serve, env=PUBLISHER)).url()
        yield url, database.dsn, folder


@pytest.fixture
def place(database: TestDatabase, tmp_path: Path) -> Iterator[Place]:
    with placed(database, tmp_path) as made:
        yield made


@pytest.mark.parametrize("name", COMMANDS)
def test_command_whose_output_cannot_be_written_says_so_and_fails(
    name: str, database: TestDatabase, tmp_path: Path
) -> None:
    arguments, done = COMMANDS[name]
    with placed(database, tmp_path, server=name in ASKING) as place:
        for state, (status, message) in LOST.items():
            if state == "closed" and name not in IN_EVERY_STATE:
                continue
            called = [each.replace("/tokens", f"/tokens-{state}") for each in arguments(*place)]
            ended, _, errors = run(called, PUBLISHER, stdout=state)
            if done is None:
                said = [] if message is None else [f"sse-labels: {message}\n"]
                assert (ended, errors.splitlines(True)[-1:]) == (status, said), state
            else:
                # What it did cannot be asked for a second time, so it stands in the message.
                assert ended == 1, state
                assert "; done all the same: " + done.partition(" seq ")[0] in errors, errors


@pytest.mark.parametrize("name", [name for name in COMMANDS if "--" not in name])
def test_command_whose_messages_and_input_are_lost_does_the_same(
    name: str, database: TestDatabase, tmp_path: Path
) -> None:
    arguments, _ = COMMANDS[name]
    with placed(database, tmp_path, server=name in ASKING) as place:
        status, out, _ = run(arguments(*place), PUBLISHER, stdin="closed", stderr="closed")
    assert (status, out != "") == (0, True)


@pytest.mark.parametrize("state", STATES)
def test_refusal_that_nobody_can_read_keeps_its_exit_status(state: str) -> None:
    assert run(["tail", "nowhere"], {}, stderr=state)[0] == 2
    assert run(["publish", "--from-line=0"], {}, stdout=state, stderr=state)[0] == 2


def test_labels_from_an_input_that_is_closed_are_refused(place: Place) -> None:
    status, out, errors = run(["publish", "--url", place[0]], PUBLISHER, stdin="closed")
    assert (status, out) == (1, "")
    assert "line 1: cannot be read: Bad file descriptor; nothing of its batch is" in errors


def test_tail_notes_no_position_that_it_could_not_write(place: Place) -> None:
    url, _, folder = place
    for state in STATES:
        file = folder / f"state {state}"
        following = ["tail", url, "--cursor=0", "--until-head", f"--state={file}"]
        assert run(following, {}, stdout=state)[0] != 0
        assert file.read_text() == "", state
        status, out, _ = run(following, {}, stderr=state)
        assert (status, len(out.splitlines())) == (0, LABELS), state


def test_tail_whose_state_file_is_on_a_full_disk_says_so(place: Place) -> None:
    url, _, folder = place
    # No file may have a byte: the write fails as it does on a full disk.
    arguments = ["tail", url, "--cursor=0", "--until-head", f"--state={folder / 'state'}"]
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *command(), *arguments]
    ended = subprocess.run(limited, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1
    assert len(ended.stdout.splitlines()) == 1
    assert ended.stderr == (
        f"sse-labels: --state: {folder / 'state'}: File too large; seq 1 was written out and not "
        "noted\n"
    )


def eventually(state: Callable[[], bool]) -> None:
    """Wait until a server, which can tell nobody, has come to a state."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not state():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health/ready").status_code == 200
    return False


@contextlib.contextmanager
def started(arguments: Sequence[str], state: str) -> Iterator[None]:
    """A server all of whose standard streams are in a state; it ends in order."""
    states = {"stdin": "closed", "stdout": state, "stderr": state}
    process, stack = start(arguments, PUBLISHER, **states)
    with stack:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(PATIENCE_SECONDS)
    assert status == 0


def publish(url: str) -> int:
    headers = {"Authorization": f"Bearer {PUBLISHER['SSE_LABELS_PUBLISH_TOKEN']}"}
    return httpx.post(f"{url}/labels", json={"labels": [LABEL]}, headers=headers).status_code


@pytest.mark.parametrize(("workers", "state"), [(1, "closed"), *((2, state) for state in STATES)])
def test_server_serves_whatever_happens_to_its_streams(
    workers: int, state: str, database: TestDatabase
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", *QUICK_SERVER[1:], f"--port={port}", f"--workers={workers}"]
    with started([*arguments, "--dsn", database.dsn], state):
        eventually(lambda: is_ready(url))
        assert publish(url) == 201
        with httpx.stream("GET", f"{url}/stream?cursor=0") as stream:
            lines = stream.iter_lines()
            assert any(line.startswith('data: {"seq":1,') for line in lines)
    assert len(database.stored()) == 1


@pytest.mark.parametrize("state", ["closed", "broken"])
def test_demo_serves_whatever_happens_to_its_streams(state: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        reachable_directory() as directory,
        started(["demo", f"--port={port}", f"--data-dir={directory / 'data'}"], state),
    ):
        eventually(lambda: is_ready(url))
        with httpx.stream("GET", f"{url}/stream?cursor=0") as stream:
            assert any(line.startswith('data: {"seq":1,') for line in stream.iter_lines())


@pytest.mark.parametrize("state", ["closed", "broken"])
def test_mirror_stores_whatever_happens_to_its_streams(state: str, place: Place) -> None:
    with reachable_directory() as directory:
        data_dir = f"--data-dir={directory / 'data'}"
        with running("serve", *QUICK_SERVER, data_dir) as server:
            mirrored = server.url()
            arguments = ["mirror", "--any-source", data_dir, place[0].replace("http:", "ws:")]
            with started(arguments, state):
                eventually(lambda: httpx.get(f"{mirrored}/health/ready").json()["head"] >= LABELS)
