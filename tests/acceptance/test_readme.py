"""The README's commands, run as they stand there.

Only the places are others: a server of this test's own for 127.0.0.1:8080, its database for
postgresql://…, a folder of its own for the home.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.database import TestDatabase, reachable_directory, until
from support.labeler import labeler, wire_label
from support.program import PATIENCE_SECONDS, REPOSITORY, command, environment, free_port
from support.server import PUBLISH_TOKEN, RunServer
from support.system import program

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
#: The file of an operator's tokens, in the folder where commands run.
TOKENS = "tokens"


def commands_of(block: str) -> list[str]:
    """The lines of a block without their comments."""
    return [re.sub(r" +# .*", "", line) for line in block.splitlines() if line]


#: The blocks of commands, by their first one.
BLOCKS = {
    commands_of(block)[0]: commands_of(block)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
}
#: What cannot be run in a test, because it changes the machine, and what shows it instead.
ELSEWHERE = {
    "apt-get install nginx ssl-cert": "test_nginx.py: nginx -t and reload with that very file",
    "OLD=/usr/lib/postgresql/15/bin": "test_embedded.py: these lines, from 18 to 18",
}
CLAIMED = {"make demo", "make bench"}
#: Commands that do not end, and log.
LOGGING = re.compile("serve|sse-labels mirror")


def block(first: str) -> pytest.MarkDecorator:
    """Give a test the block that begins with this command."""
    CLAIMED.add(first)
    return pytest.mark.parametrize("lines", [BLOCKS.get(first)], ids=[first])


def test_every_block_of_commands_is_run_here() -> None:
    assert BLOCKS.keys() == CLAIMED | ELSEWHERE.keys()


@dataclass
class Shell:
    """Runs lines of the README in a folder of its own."""

    home: Path
    url: str
    dsn: str
    variables: dict[str, str]
    streams: Callable[[], Any] = lambda: 0
    #: What stands for more of the README's names.
    places: dict[str, str] = field(default_factory=dict)

    async def run(self, line: str, **variables: str) -> str:
        """Run a command to its end; return what it wrote, on success."""
        async with self.started(line, **variables) as process:
            async with asyncio.timeout(PATIENCE_SECONDS):
                out, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return out.decode()

    async def run_until(self, line: str, pattern: str, **variables: str) -> str:
        """Run a command that does not end, until what it wrote matches; return that."""
        text = ""
        async with self.started(line, **variables) as process:
            assert process.stdout is not None
            async with asyncio.timeout(PATIENCE_SECONDS):
                while re.search(pattern, text) is None:
                    some = await process.stdout.read(65536)
                    assert some, f"it ended before {pattern!r}: {text}"
                    text += some.decode()
        return text

    @asynccontextmanager
    async def started(
        self, line: str, **variables: str
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a line in bash; all that is left of it ends with the block."""
        places = {
            "http://127.0.0.1:8080": self.url,
            "https://labels.example": self.url,
            "postgresql://…": shlex.quote(self.dsn),
            ".venv/bin/python": sys.executable,
            **self.places,
        }
        for theirs, ours in places.items():
            line = line.replace(theirs, ours)
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", line, cwd=self.home, start_new_session=True,
            env=environment(**{**self.variables, **variables}),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            # A server's log is what shows that it serves.
            stderr=asyncio.subprocess.STDOUT if LOGGING.search(line) else asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.communicate()


@pytest.fixture
def home() -> Iterator[Path]:
    """A home with `sse-labels` on its path, and the demo's token where the README says."""
    with reachable_directory() as directory:
        (directory / "bin").mkdir()
        program = directory / "bin/sse-labels"
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command())} "$@"\n')
        program.chmod(0o755)
        for place in ("sse-labels", "sse-labels/demo"):
            token = directory / ".local/share" / place / "publish-token"
            token.parent.mkdir(parents=True)
            token.write_text(PUBLISH_TOKEN + "\n")
            token.chmod(0o600)
        yield directory


@pytest.fixture
async def shell(home: Path, run_server: RunServer, database: TestDatabase) -> Any:
    """A shell in that home, with a server that holds 60 labels."""
    database.fill(60)
    tokens = home / TOKENS
    tokens.touch(mode=0o600)
    async with run_server(publish_tokens_file=tokens, heartbeat_seconds=0.5) as server:
        variables = {
            "HOME": str(home),
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            # What the README's lines have by default.
            "SSE_LABELS_URL": server.url,
            "SSE_LABELS_DATA_DIR": f"{home}/.local/share/sse-labels",
        }
        streams = server.app.metrics.gauges["streams"]
        yield Shell(home, server.url, database.dsn, variables, streams)


@pytest.fixture
def to_serve(database: TestDatabase) -> dict[str, str]:
    """Variables that let `sse-labels serve` run beside the test's server."""
    return {"SSE_LABELS_DSN": database.dsn, "SSE_LABELS_PORT": str(free_port())}


def events_in(text: str) -> list[dict[str, Any]]:
    """The labels in a piece of a stream."""
    return [json.loads(data) for data in re.findall(r"^data: (\{\"seq\".*\})$", text, re.MULTILINE)]


@pytest.mark.parametrize("line", [*BLOCKS["make demo"], *BLOCKS["make bench"]])
def test_makes_targets_are_there(line: str) -> None:
    """Not run, but read: `make test` would run itself, what others do has tests of its own."""
    words = shlex.split(line)
    done = subprocess.run([*words, "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@block("curl -N http://127.0.0.1:8080/stream")
async def test_curl(lines: list[str], shell: Shell, database: TestDatabase) -> None:
    live, everything, after = lines
    assert '"cursor":60,"head":60' in await shell.run_until(live, "StreamOpened")
    assert events_in(await shell.run_until(everything, "id: 60\n.*\n\n")) == database.stored()
    assert events_in(await shell.run_until(after, "id: 60\n.*\n\n")) == database.stored(after=41)


@block("sse-labels tail --state cursor.txt")
async def test_tail(lines: list[str], shell: Shell, database: TestDatabase) -> None:
    remembering, filtered = lines
    spam = [each for each in database.stored() if each["labels"][0]["val"] == "spam"]
    assert [json.loads(line) for line in (await shell.run(filtered)).splitlines()] == spam
    (shell.home / "cursor.txt").write_text("58\n")
    text = await shell.run_until(remembering, '"seq":60.*\n')
    assert [json.loads(line) for line in text.splitlines()] == database.stored(after=58)
    assert int((shell.home / "cursor.txt").read_text()) == 60


@block("curl -N 'http://127.0.0.1:8080/stream?values=spam&values=porn&uriPatterns=at://did:plc:*'")
async def test_filters(lines: list[str], shell: Shell, database: TestDatabase) -> None:
    async with shell.started(lines[0]) as process:
        assert process.stdout is not None
        await process.stdout.readuntil(b"StreamOpened")
        database.insert(1, val="rude")
        database.insert(1, val="porn", uri="did:plc:b")
        [seq] = database.insert(1, val="porn")
        text = await process.stdout.readuntil(b"id: %d\ndata: " % seq)
        text += await process.stdout.readuntil(b"\n\n")
    assert events_in(text.decode()) == database.stored(after=seq - 1)


@block("curl -N 'http://127.0.0.1:8080/stream?snapshot=active&expired=live'")
async def test_state(lines: list[str], shell: Shell, database: TestDatabase) -> None:
    stream, since, query = lines
    in_force = [each for each in database.stored() if "neg" not in each["labels"][0]]
    assert len(in_force) == 55
    soon = datetime.now(UTC) + timedelta(seconds=1)
    async with shell.started(stream) as process:
        assert process.stdout is not None
        text = (await process.stdout.readuntil(b"SnapshotComplete")).decode()
        assert events_in(text) == in_force
        [seq] = database.insert(1, uri="at://a/b", exp=soon.isoformat())
        await process.stdout.readuntil(b"id: %d\n" % seq)
        told = await process.stdout.readuntil(b"LabelExpired")
        assert b"event: info" in told
        assert datetime.now(UTC) >= soon
    assert f'"seq":{seq},"label":' in await shell.run_until(since, "LabelExpired.*\n\n")
    answer = json.loads(await shell.run(query))
    assert answer["labels"] == [each["labels"][0] for each in in_force[:50]]


@block("curl http://127.0.0.1:8080/labels \\")
async def test_publishing(lines: list[str], shell: Shell, database: TestDatabase) -> None:
    assert await shell.run("\n".join(lines)) == '{"seqs":[61]}\n'
    [stored] = database.stored(after=60)
    assert stored["labels"][0]["src"] == "did:web:labeler.example"


@block(
    """echo '{"src":"did:web:labeler.example","uri":"did:web:account.example","val":"spam","""
    """"cts":"2026-01-01T00:00:00Z"}' >labels.jsonl"""
)
async def test_publishing_a_file(lines: list[str], shell: Shell, database: TestDatabase) -> None:
    for line in lines:
        await shell.run(line)
    assert [event["seq"] for event in database.stored(after=60)] == [61, 62]


@block("sse-labels token alice --publish-tokens-file tokens")
async def test_a_token_of_ones_own(
    lines: list[str], shell: Shell, database: TestDatabase, to_serve: dict[str, str]
) -> None:
    make, serve = lines
    token = (await shell.run(make)).strip()
    publish = BLOCKS["curl http://127.0.0.1:8080/labels \\"]
    line = "\n".join(publish).replace(re.findall(r"\$\(cat .*?\)", publish[1])[0], token)
    async with shell.started(serve, **to_serve) as process:
        assert process.stdout is not None
        await process.stdout.readuntil(b"serving: address=")
        address = (await process.stdout.readline()).split()[0].decode()
        assert "seqs" in await shell.run(line.replace("http://127.0.0.1:8080", address))
    assert len(database.stored(after=60)) == 1


@block("export SSE_LABELS_JWT_SECRET=0123456789abcdef0123456789abcdef")
async def test_a_protected_stream(lines: list[str], shell: Shell, to_serve: dict[str, str]) -> None:
    address = f"http://127.0.0.1:{to_serve['SSE_LABELS_PORT']}"
    script = "\n".join(lines).replace("http://127.0.0.1:8080", address)
    assert "StreamOpened" in await shell.run_until(script, "StreamOpened", **to_serve)


@block("pip install .")
async def test_serving(lines: list[str], shell: Shell, to_serve: dict[str, str]) -> None:
    """The package's installation is test_wheel.py's."""
    for line, more in zip(lines[1:], ({"SSE_LABELS_DSN": ""}, {}), strict=True):
        await shell.run_until(line, "serving: address=", **{**to_serve, **more})


@block("sse-labels doctor https://labels.example --dsn postgresql://…")
async def test_the_doctor(lines: list[str], shell: Shell) -> None:
    assert "0 failure" in await shell.run(lines[0])


@block("sse-labels verify https://labels.example --source-keys-file keys")
async def test_verifying(lines: list[str], shell: Shell) -> None:
    (shell.home / "keys").touch()
    text = await shell.run(lines[0])
    assert "60 labels are the same in queryLabels" in text
    assert "0 valid, 0 invalid, 60 unsigned, 0 unknown" in text
    assert text.endswith("\nsound\n")


@block("ADMIN=$(sse-labels token olga --rights admin --publish-tokens-file tokens)")
async def test_who_is_connected(lines: list[str], shell: Shell) -> None:
    make, laggards, of_peer, cut = lines
    async with shell.started(f"curl -sN {shell.url}/stream") as process:
        assert process.stdout is not None
        await process.stdout.readuntil(b"StreamOpened")
        token = {"ADMIN": (await shell.run(make.removeprefix("ADMIN=$(")[:-1])).strip()}
        [stream] = json.loads(await shell.run(laggards, **token))["streams"]
        none = await shell.run(of_peer, **token)
        assert json.loads(none)["streams"] == []
        assert await shell.run(cut.replace("0123456789abcdef", stream["id"]), **token) == ""
        assert b"StreamCut" in await process.stdout.read()


@block("sse-labels reseed --above 123456 --dsn postgresql://…")
async def test_reseeding(lines: list[str], home: Path, database: TestDatabase) -> None:
    shell = Shell(home, "", database.dsn, {"PATH": f"{home}/bin:{os.environ['PATH']}"})
    assert "the next seq is 123457" in await shell.run(lines[0])
    assert database.insert() == [123457]


@block("openssl ecparam -name secp256k1 -genkey -noout -out signing-key.pem")
async def test_signing(lines: list[str], shell: Shell, to_serve: dict[str, str]) -> None:
    program("openssl")
    await shell.run(lines[0])
    said = await shell.run_until(lines[1], r"key=did:key:zQ3\w+", **to_serve)
    assert "did=did:web:labeler.example" in said


@block(
    "sse-labels mirror did:web:labeler.example=wss://labeler.example"
    " did:plc:ewvi7nxzyoun6zhxrhs64oiz=wss://ozone.example"
)
async def test_mirroring(lines: list[str], home: Path, database: TestDatabase) -> None:
    async with labeler() as one, labeler() as two:
        one.add(wire_label(1, src="did:web:labeler.example"))
        two.add(wire_label(2), wire_label(3, src="did:plc:ewvi7nxzyoun6zhxrhs64oiz"))
        places = {"wss://labeler.example": one.url, "wss://ozone.example": two.url}
        variables = {
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "SSE_LABELS_DSN": database.dsn,
            "SSE_LABELS_REPORT_SECONDS": "0.1",
        }
        shell = Shell(home, "", database.dsn, variables, places=places)
        mirrored = r"mirrored: upstream=\S+ cursor=1 stored=1"
        await shell.run_until(lines[0], rf"(?s){mirrored}.*{mirrored}")
    uris = {event["labels"][0]["uri"][-3:] for event in database.stored()}
    assert uris == {"3k1", "3k3"}


async def test_the_lines_of_python(shell: Shell, database: TestDatabase) -> None:
    [script] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = script.replace("http://127.0.0.1:8080", shell.url)
    (shell.home / "reader.py").write_text(script)
    async with shell.started(".venv/bin/python -u reader.py") as process:
        assert process.stdout is not None
        await until(lambda: shell.streams() == 1)
        database.insert(1, val="rude")
        line = await process.stdout.readline()
    assert [ast.literal_eval(line.decode())] == database.stored(after=60)


def test_every_link_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    # As GitHub names them.
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    inside = [target for target in targets if not target.startswith("https://")]
    assert inside
    for target in inside:
        file, _, anchor = target.partition("#")
        assert (REPOSITORY / file).exists(), target
        assert file or anchor in anchors, target


def test_every_file_that_shows_a_promise_is_there() -> None:
    promises = README.partition("## What it promises")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:tests/)?[\w/]*\w+\.py)`", promises))
    assert named
    files = {file.name for file in (REPOSITORY / "tests").rglob("*.py")}
    for name in named:
        assert (REPOSITORY / name).exists() if "/" in name else name in files, name
