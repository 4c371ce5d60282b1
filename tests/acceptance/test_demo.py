"""`sse-labels demo`: what it prints can be pasted, and it leaves nothing behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sse_labels.embedded import EmbeddedPostgres

from support.database import TestDatabase, reachable_directory
from support.program import PATIENCE_SECONDS, Program, failure, postgres_runs_in, ran, running


def first_events(command: str, count: int) -> list[dict[str, object]]:
    """Run the printed command (curl, or httpx where there is none) until it has shown events."""
    words = shlex.split(command)
    assert words[:2] == ["curl", "-N"]
    found: list[dict[str, object]] = []
    if shutil.which("curl") is None:
        with httpx.stream("GET", words[2], timeout=PATIENCE_SECONDS) as response:
            return take(response.iter_lines(), count, found)
    curl = subprocess.Popen(
        [*words, "--silent", "--max-time", str(PATIENCE_SECONDS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with curl:
        take(iter(curl.stdout), count, found)
        curl.terminate()
    return found


def take(
    lines: Iterator[str], count: int, found: list[dict[str, object]]
) -> list[dict[str, object]]:
    for line in lines:
        if line.startswith('data: {"seq":'):
            found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
    return found


def printed(demo: Program, what: str) -> str:
    return demo.wait_for(rf"^  {what} +(\S.*)$")[1]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A data directory for both tests: making the database takes most of a first start."""
    with reachable_directory() as made:
        yield made / "data"


def test_demo_prints_commands_that_work_and_ends_without_a_trace(directory: Path) -> None:
    data_dir = directory / "demo"
    arguments = ("demo", "--port=0", "--data-dir", str(directory), "--interval-seconds=0.02")
    with running(*arguments) as demo:
        demo.wait_for("^Ctrl-C stops it")
        live = first_events(printed(demo, "read it"), 3)
        everything = first_events(printed(demo, "from start"), 10)
        page = httpx.get(printed(demo, "look at it"))
        token_file = printed(demo, "the publish token is in")
        file = directory / "labels"
        file.write_text(json.dumps(live[0]["labels"][0]))
        published = shlex.split(printed(demo, "publish"))
        assert (published[0], published[-1]) == ("sse-labels", "FILE")
        stored_one = ran(*published[1:-1], str(file))
        assert re.fullmatch(r"1 label stored, the last as seq \d+\n", stored_one.output)
        # Not among what `serve --data-dir` would show.
        assert postgres_runs_in(data_dir)
        demo.press_ctrl_c()
        assert demo.wait() == 0
    assert not postgres_runs_in(data_dir)
    assert token_file == f"{data_dir}/publish-token"
    with EmbeddedPostgres(data_dir) as postgres:
        stored = TestDatabase(postgres.dsn, "sse_labels").stored()
    assert demo.errors == ""
    assert demo.out[0] == "sse_labels is up; 50 made-up labels a second."
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert everything == stored[:10]
    first = int(str(live[0]["seq"]))
    assert live == stored[first - 1 : first + 2]


def test_demo_refuses_a_port_that_is_taken_and_leaves_no_postgres(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        demo = ran("demo", f"--port={port}", "--data-dir", str(directory))
    status, said = failure(demo)
    assert said.startswith(f"sse-labels: --port: got {port}, expected a free port on 127.0.0.1")
    assert (status, len(demo.err)) == (2, 1)
    assert not postgres_runs_in(directory / "demo")
