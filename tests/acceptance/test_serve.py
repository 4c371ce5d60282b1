"""`sse-labels serve`: started, asked wrongly, told to stop, killed, started again."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import pytest

from sse_labels.cli import cli
from sse_labels.cli.layout import Option
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.publishing.tokens import add_token

from support.database import TestDatabase, reachable_directory
from support.program import (
    PATIENCE_SECONDS,
    QUICK_SERVER,
    REPOSITORY,
    Program,
    called_all,
    command,
    environment,
    failure,
    free_port,
    postgres_runs_in,
    ran,
    ran_all,
    running,
)
from support.reading import reading
from support.server import LABEL

TOKEN = "a-token-for-tests"
STREAMS = 1000


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory for embedded servers."""
    with reachable_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def data_dir(place: Path) -> Path:
    """One data directory for all tests here: making it takes most of a server's first start."""
    return place / "data"


def publish(url: str, token: str, count: int = 1) -> httpx.Response:
    return httpx.post(
        f"{url}/labels",
        content=json.dumps({"labels": [LABEL] * count}),
        headers={"Authorization": f"Bearer {token}"},
        timeout=PATIENCE_SECONDS,
    )


# Help and wrong values


def test_help_names_every_option_with_its_variable_and_default() -> None:
    context = click.Context(cli)
    names = cli.list_commands(context)
    assert sorted(names) == [
        "demo", "doctor", "migrate", "mirror", "publish", "reseed", "serve", "tail", "token",
        "verify",
    ]  # fmt: skip
    helps = called_all([((name, "--help"), {}) for name in names])
    for name, shown in zip(names, helps, strict=True):
        assert (shown.status, shown.err) == (0, [])
        assert max(map(len, shown.out)) <= 80
        text = " ".join(" ".join(shown.out).split())
        for option in cli.get_command(context, name).params:
            if isinstance(option, click.Option):
                assert isinstance(option, Option)
                assert option.opts[0] in text
                assert f" SSE_LABELS_{option.name.upper()} " in text
                assert option.help in text
                assert f"[default: {option.shown_default}]" in text


def test_wrong_value_is_refused_by_key_value_and_expectation() -> None:
    cases = [
        (("serve", "--port", "http"), {}, "--port: got 'http', expected a whole number from 0"),
        (("serve",), {"SSE_LABELS_PORT": "x"}, "SSE_LABELS_PORT: got 'x', expected a whole num"),
        (("serve", "--poll-seconds=0"), {}, "--poll-seconds: got '0', expected seconds from 0.01"),
        (("demo",), {"SSE_LABELS_INTERVAL_SECONDS": "1h"}, "SSE_LABELS_INTERVAL_SECONDS: got '1"),
        (("serve",), {"SSE_LABELS_MIGRATE": "maybe"}, "SSE_LABELS_MIGRATE: got 'maybe', expected"),
        (("serve", "--cors-origins=example.com"), {}, "--cors-origins: got 'example.com', e"),
        (("migrate", "--log-level=loud"), {}, "--log-level: got 'loud', expected one of debug,"),
        (
            ("serve", "--retry-min-seconds=9"),
            {},
            "--retry-max-seconds: got 5.0, expected at least --retry-min-seconds, which is 9",
        ),
        (("publish",), {"SSE_LABELS_URL": "ftp://x"}, "SSE_LABELS_URL: got 'ftp://x', expected"),
        (
            ("publish",),
            {"SSE_LABELS_PUBLISH_TOKEN": "se cret"},
            "SSE_LABELS_PUBLISH_TOKEN: got '(not shown)', expected a token of visible ASCII",
        ),
        (("tail", "localhost:8080"), {}, "URL: got 'localhost:8080', expected an address such as"),
        (("tail", "--cursor=-1"), {}, "--cursor: got '-1', expected a whole number from 0"),
        (("tail",), {"SSE_LABELS_UNTIL_HEAD": "2"}, "SSE_LABELS_UNTIL_HEAD: got '2', expected"),
    ]  # fmt: skip
    ended = called_all((arguments, env) for arguments, env, _ in cases)
    for program, (_, _, message) in zip(ended, cases, strict=True):
        status, said = failure(program)
        assert said.startswith(f"sse-labels: {message}")
        assert status == 2
        assert len(program.err) == 1


def test_usage_errors_end_with_2_and_name_the_program() -> None:
    unknown, missing = ran_all([(("serve", "--zzz"), {}), (("publish", "/nowhere"), {})])
    assert failure(unknown) == (2, "Error: No such option '--zzz'.")
    assert "Usage: sse-labels serve" in unknown.errors
    assert failure(missing)[0] == 2
    assert "/nowhere" in missing.errors


# A place that cannot be used


def test_malformed_dsn_is_refused_and_not_shown() -> None:
    calls: list[tuple[tuple[str, ...], dict[str, str]]] = []
    for dsn in (
        "postgres://me:geheim@db:5432/labels?sslmod=require",
        "postgress://me:geheim@db/labels",
    ):
        calls += [(("serve", "--dsn", dsn), {}), (("migrate",), {"SSE_LABELS_DSN": dsn})]
    for program in called_all(calls):
        status, said = failure(program)
        assert status == 2
        assert re.match(r"sse-labels: (--dsn|SSE_LABELS_DSN): got '\(not shown\)', expected", said)
        assert not any("geheim" in line for line in program.err)


def test_database_that_does_not_answer_is_named_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        dsns = [f"postgresql://me:geheim@127.0.0.1:{at}/labels" for at in (free_port(), port)]
        refused, waited = ran_all([
            (("serve", "--port=0", "--dsn", dsns[0]), {}),
            (("migrate", "--connect-timeout-seconds=0.2"), {"SSE_LABELS_DSN": dsns[1]}),
        ])  # fmt: skip
    assert "sse-labels: --dsn: 127.0.0.1:" in refused.errors
    assert "Connection refused" in refused.errors
    assert waited.err[-1] == (
        f"sse-labels: SSE_LABELS_DSN: 127.0.0.1:{port}: cannot connect: no answer in 0.2 s"
    )
    for program in (refused, waited):
        assert program.process.returncode == 1
        assert "geheim" not in program.errors
        assert "Traceback" not in program.errors


def test_port_that_is_taken_is_named(database: TestDatabase) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        option, variable = called_all([
            (("serve", "--dsn", database.dsn, "--port", port), {}),
            (("serve", "--dsn", database.dsn), {"SSE_LABELS_PORT": port}),
        ])  # fmt: skip
    for program, key in ((option, "--port"), (variable, "SSE_LABELS_PORT")):
        status, said = failure(program)
        assert said.startswith(
            f"sse-labels: {key}: got {port}, expected a free port on 127.0.0.1 "
            f"(Address already in use"
        )
        assert status == 2


def test_data_directory_that_cannot_be_used_is_named(place: Path) -> None:
    (place / "file").write_text("not a directory")
    closed = place / "closed"
    # Root is stopped by nothing itself; the system user that PostgreSQL then runs as is.
    closed.mkdir(mode=0o700 if os.geteuid() == 0 else 0o500)
    calls = [
        (("serve", "--data-dir", str(place / "file")), {}),
        (("demo", "--data-dir", str(closed / "data")), {}),
        (("migrate",), {"SSE_LABELS_DATA_DIR": str(closed / "data")}),
    ]
    keys = ["--data-dir", "--data-dir", "SSE_LABELS_DATA_DIR"]
    for program, key in zip(ran_all(calls), keys, strict=True):
        status, said = failure(program)
        assert said.startswith(f"sse-labels: {key}: got '{place}/")
        assert "expected a directory that" in said
        assert status == 2


def test_without_a_home_and_a_name_every_help_is_shown_and_a_missing_place_is_named(
    tmp_path: Path,
) -> None:
    """A container's user with any ID: neither HOME nor an entry in /etc/passwd."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pwd\n"
        "def missing(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = missing\n"
        "os.geteuid = os.getuid = lambda: 12345\n"
        "os.environ.pop('HOME', None)\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)]), "XDG_DATA_HOME": ""}
    names = cli.list_commands(click.Context(cli))
    commands = ("demo", "serve", "migrate", "publish", "doctor")
    calls = [("--help",), *((name, "--help") for name in names), *((name,) for name in commands)]
    ended = called_all([(call, {}) for call in calls], **env)
    helps, refused = ended[: -len(commands)], ended[-len(commands) :]
    assert [(shown.status, shown.err) for shown in helps] == [(0, [])] * len(helps)
    in_place = {name: "\n".join(shown.out) for name, shown in zip(names, helps[1:], strict=True)}
    for name in ("demo", "serve", "migrate", "publish"):
        assert "[default: none, without a home]" in in_place[name]
    for program in refused:
        status, said = failure(program)
        assert "--data-dir: not given, expected a directory: this user has no home" in said
        assert status == 2
    gone = f"--dsn=host={tmp_path} user=x dbname=x"
    for program in ran_all([(("serve", "--port=0", gone), env), (("doctor", gone), env)]):
        assert "Traceback" not in program.errors
        assert program.process.returncode == 1


# On a database of one's own


def test_with_a_dsn_and_no_token_publishing_is_off(database: TestDatabase) -> None:
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn) as server:
        answer = publish(server.url(), TOKEN)
        assert server.end(signal.SIGINT) == 0
    assert answer.status_code == 403
    assert server.err[0].startswith("publishing is off: neither --publish-token (SSE_LABELS_")
    assert server.out == []
    assert "Traceback" not in server.errors


def test_settings_come_from_the_environment(database: TestDatabase) -> None:
    variables = {
        "SSE_LABELS_DSN": database.dsn,
        "SSE_LABELS_PORT": "0",
        "SSE_LABELS_HOST": "::1",
        "SSE_LABELS_PUBLISH_TOKEN": TOKEN,
        "SSE_LABELS_PUBLISH_MAX_LABELS": "2",
        "SSE_LABELS_LOG_LEVEL": "",
    }
    with running("serve", env=variables) as server:
        url = server.url()
        assert url.startswith("http://[::1]:")
        assert publish(url, TOKEN, 2).json() == {"seqs": [1, 2]}
        assert publish(url, TOKEN, 3).status_code == 413
        assert publish(url, "another").status_code == 401
        assert server.end() == 0
    assert TOKEN not in server.errors
    assert "Traceback" not in server.errors


@pytest.mark.parametrize(
    ("hosts", "reached"),
    [
        (("--host", "::"), ("127.0.0.1", "[::1]")),
        (("--host", "127.0.0.1", "--host", "::1"), ("127.0.0.1", "[::1]")),
        (("--host", "127.0.0.1,127.0.0.2"), ("127.0.0.1", "127.0.0.2")),
        (("--host", "::", "--host", "0.0.0.0"), ("127.0.0.1", "[::1]")),
        (("--host", "::", "--host", "::"), ("127.0.0.1", "[::1]")),
    ],
)
def test_every_host_is_listened_on_at_one_port(
    database: TestDatabase, hosts: tuple[str, ...], reached: tuple[str, ...]
) -> None:
    with running("serve", "--port", "0", *hosts, "--dsn", database.dsn) as server:
        port = server.url().rsplit(":", 1)[1]
        for host in reached:
            answer = httpx.get(f"http://{host}:{port}/health/live", trust_env=False)
            assert answer.status_code == 200
        assert server.end() == 0


def test_a_peer_on_a_socket_for_both_families_is_known_by_its_own_address(
    database: TestDatabase,
) -> None:
    with running("serve", "--port", "0", "--host", "::", "--dsn", database.dsn) as server:
        port = server.url().rsplit(":", 1)[1]
        with httpx.stream("GET", f"http://127.0.0.1:{port}/stream", trust_env=False):
            pass
        assert server.end() == 0
    assert "stream opened: peer=127.0.0.1 " in server.errors


def test_a_host_that_is_not_here_beside_one_that_is_ends_the_start(database: TestDatabase) -> None:
    with running(
        "serve", "--port", "0", "--host", "127.0.0.1", "--host", "192.0.2.1", "--dsn", database.dsn
    ) as server:
        assert server.wait() == 2
    said = "sse-labels: --host: got '192.0.2.1', expected an address of this machine"
    assert server.err[-1] == said


def test_told_to_stop_while_another_server_migrates_it_ends_at_once(
    database: TestDatabase,
) -> None:
    other = database.connect()
    with other.cursor() as holding:
        holding.execute("SELECT pg_advisory_lock(hashtext('sse-labels'))")
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn) as server:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not database.execute(
            "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.end() == 0
    assert "Traceback" not in server.errors
    assert "serving" not in server.errors


async def test_stream_resumed_over_a_killed_server_loses_nothing(database: TestDatabase) -> None:
    arguments = ("serve", *QUICK_SERVER, f"--port={free_port()}", "--dsn", database.dsn)
    received = []
    cursor = "0"
    written = threading.Event()

    def write() -> None:
        connection = database.connect()
        with connection.cursor() as writing:
            while not written.is_set():
                writing.execute(
                    "INSERT INTO label (src, uri, cid, val, cts) VALUES (%s, %s, '', 'spam', %s)",
                    (LABEL["src"], LABEL["uri"], LABEL["cts"]),
                )

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2):
            with running(*arguments) as server:
                url = await asyncio.to_thread(server.url)
                async with reading(f"{url}/stream", last_event_id=cursor) as reader:
                    await reader.until_events(200)
                    await asyncio.to_thread(server.end, signal.SIGKILL)
                    with pytest.raises(httpx.RemoteProtocolError):
                        await reader.until_closed()
                received += reader.events
                cursor = reader.last_id
    finally:
        written.set()
        writer.join()
    with running(*arguments) as server:
        url = await asyncio.to_thread(server.url)
        async with reading(f"{url}/stream", last_event_id=cursor) as reader:
            received += await reader.until_seq(database.stored()[-1]["seq"])
    assert received == database.stored()


async def test_two_servers_that_start_at_once_migrate_once_and_both_stream(
    empty_database: TestDatabase,
) -> None:
    arguments = ("serve", *QUICK_SERVER, "--dsn", empty_database.dsn)
    env = {"SSE_LABELS_PUBLISH_TOKEN": TOKEN}
    with running(*arguments, env=env) as one, running(*arguments, env=env) as other:
        urls = [await asyncio.to_thread(server.url) for server in (one, other)]
        async with (
            reading(f"{urls[0]}/stream", cursor=0) as first,
            reading(f"{urls[1]}/stream", cursor=0) as second,
        ):
            for url in urls:
                answer = await asyncio.to_thread(publish, url, TOKEN, 3)
                assert answer.status_code == 201
            stored = empty_database.stored()
            assert len(stored) == 6
            assert await first.until_events(6) == stored
            assert await second.until_events(6) == stored
        assert [await asyncio.to_thread(server.end) for server in (one, other)] == [0, 0]
    migrated = [line for line in [*one.err, *other.err] if "migrated: number=1 " in line]
    assert len(migrated) == 1
    assert "Traceback" not in one.errors + other.errors


async def test_sigterm_ends_a_thousand_streams_in_order(database: TestDatabase) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, STREAMS + 500)), hard))
    database.fill(10)

    async def follow(port: int, opened: asyncio.Semaphore) -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /stream?cursor=0 HTTP/1.1\r\nHost: a\r\n\r\n")
        head = await reader.readuntil(b"id: 10\n")
        opened.release()
        rest = await reader.read(-1)  # to the close
        closed = time.monotonic()
        writer.close()
        return head + rest, closed

    with running(
        "serve", "--port=0", "--dsn", database.dsn, "--log-level=warning", "--no-migrate"
    ) as quiet:
        # The port is not logged at this level: what a thousand streams log is no part of this.
        port = await asyncio.to_thread(listening_port, quiet)
        opened = asyncio.Semaphore(0)
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as tasks:
            clients = [tasks.create_task(follow(port, opened)) for _ in range(STREAMS)]
            for _ in range(STREAMS):
                await opened.acquire()
            told = time.monotonic()
            status = await asyncio.to_thread(quiet.end)
            seconds = time.monotonic() - told
    assert status == 0
    ends = [client.result() for client in clients]
    for received, _ in ends:
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.endswith(b"\n\n\r\n0\r\n\r\n"), received[-300:]
        error = re.search(rb"event: error\ndata: (.*)\n", received)
        assert error is not None
        assert json.loads(error[1])["error"] == "ServerStopping"
        assert json.loads(error[1])["cursor"] == 10
    last_close = max(closed for _, closed in ends) - told
    print(  # noqa: T201 - the figure that the design asks for
        f"\nSIGTERM with {STREAMS} streams: last client closed after {last_close:.2f} s, "
        f"exit after {seconds:.2f} s"
    )
    assert seconds < 5
    assert (
        quiet.errors == "publishing is off: neither --publish-token (SSE_LABELS_PUBLISH_TOKEN) nor"
        " --publish-tokens-file is given\n"
    )


def listening_port(program: Program) -> int:
    """The port that a process listens on, by /proc."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        inodes = set()
        for entry in Path(f"/proc/{program.process.pid}/fd").iterdir():
            try:
                inodes.add(str(entry.readlink()))
            except OSError:
                continue
        for line in Path(f"/proc/{program.process.pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                return int(fields[1].rpartition(":")[2], 16)
        time.sleep(0.05)
    raise AssertionError("it does not listen")


async def test_broken_promise_ends_the_process_and_every_stream(database: TestDatabase) -> None:
    database.fill(20)
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn) as server:
        url = await asyncio.to_thread(server.url)
        async with reading(f"{url}/stream", cursor=0) as reader:
            await reader.until_events(20)
            # As after a restore from a backup that is older than what was streamed.
            database.execute("UPDATE label_stream SET floor = 1000")
            database.execute("DELETE FROM label")
            database.execute("SELECT setval(pg_get_serial_sequence('label', 'id'), 5)")
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'sse-labels'"
            )
            assert await asyncio.to_thread(server.wait) == 1
            await reader.until_closed()
    assert server.err[-1].startswith(
        "sse-labels: the database went back or was rebuilt: its newest seq is 5 in epoch "
    )
    assert "Traceback" not in server.errors
    assert reader.news[-1][0] == "error"


# The embedded database


def test_embedded_server_keeps_token_labels_and_seqs_over_restarts(data_dir: Path) -> None:
    arguments = ("serve", *QUICK_SERVER, "--data-dir", str(data_dir))
    tokens, seqs = [], []
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(*arguments) as server:
            url = server.url()
            file = Path(server.wait_for(r"^the publish token is in (\S+)$")[1])
            assert file.parent == data_dir
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            tokens.append(file.read_text().strip())
            seqs += publish(url, tokens[-1], 3).json()["seqs"]
            assert postgres_runs_in(data_dir)
            assert server.end(number) == 0
        assert "Traceback" not in server.errors
        assert tokens[-1] not in server.errors + server.output
        assert not postgres_runs_in(data_dir)
    assert seqs == [1, 2, 3, 4, 5, 6]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) >= 43  # 256 bits in base64
    with EmbeddedPostgres(data_dir) as postgres:
        stored = TestDatabase(postgres.dsn, "sse_labels").stored()
    assert stored == [{"seq": seq, "labels": [{"ver": 1, **LABEL}]} for seq in seqs]


def test_token_that_others_may_know_is_refused_until_it_is_deleted(data_dir: Path) -> None:
    data_dir.mkdir(exist_ok=True)
    token = data_dir / "publish-token"
    token.write_text("chosen by somebody\n")
    token.chmod(0o644)
    status, said = failure(ran("serve", *QUICK_SERVER, "--data-dir", str(data_dir)))
    assert said.startswith(f"sse-labels: the token file: got '{token}', expected a file of your")
    assert said.endswith(
        "has the mode 0644 (delete it to get a new one, or chown and chmod 600 it)"
    )
    assert status == 2
    assert not postgres_runs_in(data_dir)
    token.unlink()
    with running("serve", *QUICK_SERVER, "--data-dir", str(data_dir)) as server:
        server.url()
        assert stat.S_IMODE(token.stat().st_mode) == 0o600


@pytest.mark.parametrize("workers", [1, 2])
async def test_killed_embedded_postgres_is_restarted_and_streams_go_on_and_lose_nothing(
    data_dir: Path, workers: int
) -> None:
    arguments = ("--data-dir", str(data_dir), f"--workers={workers}")
    env = {"SSE_LABELS_PUBLISH_TOKEN": TOKEN}
    with running("serve", *QUICK_SERVER, *arguments, env=env) as server:
        # With workers each says that it serves, the first process last.
        wanted = r"serving: address=(\S+)" + (" workers=2$" if workers > 1 else "$")
        url = (await asyncio.to_thread(server.wait_for, wanted))[1]
        stored = TestDatabase(EmbeddedPostgres(data_dir).dsn, "sse_labels").stored
        async with reading(f"{url}/stream", cursor=0) as one, reading(f"{url}/stream") as two:
            await two.until_opened()
            before = len(stored())
            for restarts in (1, 2):
                await publish_once_it_can(url)
                await one.until_seq(stored()[-1]["seq"])
                os.kill(int((data_dir / "postgres/postmaster.pid").read_text().split()[0]), 9)
                await until_restarted(url, restarts)
            await publish_once_it_can(url)
            last = stored()[-1]["seq"]
            assert await one.until_seq(last) == stored()
            assert await two.until_seq(last) == stored()[before:]
        assert await asyncio.to_thread(server.end) == 0
    assert server.errors.count("embedded PostgreSQL is not running, it is restarted: ") == 2
    assert "Traceback" not in server.errors
    assert not postgres_runs_in(data_dir)


async def until_restarted(url: str, times: int) -> None:
    """Wait until the metrics of any worker say so."""
    async with asyncio.timeout(PATIENCE_SECONDS), httpx.AsyncClient() as client:
        shown = rf'^sse_labels_embedded_restarts_total({{worker="1"}})? {times:.1f}$'
        while True:
            if re.search(shown, (await client.get(f"{url}/metrics")).text, re.MULTILINE):
                return
            await asyncio.sleep(0.02)


async def publish_once_it_can(url: str) -> None:
    """Publish, again and again while the database is away."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if (await asyncio.to_thread(publish, url, TOKEN, 3)).status_code == 201:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_while_starting_it_leaves_no_postgres(
    data_dir: Path, number: signal.Signals
) -> None:
    arguments = ("--data-dir", str(data_dir), "--log-level=warning")
    with running("serve", *QUICK_SERVER, *arguments) as server:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (data_dir / "postgres" / "postmaster.pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert server.end(number) == 0
    assert server.errors == ""
    assert not postgres_runs_in(data_dir)


def test_signals_after_the_first_do_not_leave_postgres_running(data_dir: Path) -> None:
    with running("serve", *QUICK_SERVER, "--data-dir", str(data_dir)) as server:
        server.url()
        server.send(signal.SIGTERM)
        server.wait_for("stopping")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while server.process.poll() is None and time.monotonic() < deadline:
            server.send(signal.SIGINT)
            server.send(signal.SIGTERM)
            time.sleep(0.01)
        assert server.wait() == 0
    assert "Traceback" not in server.errors
    assert not postgres_runs_in(data_dir)


def test_migrate_says_the_version_and_may_be_repeated(empty_database: TestDatabase) -> None:
    for _ in range(2):
        migrated = ran("migrate", "--dsn", empty_database.dsn, "--log-level=warning")
        assert (migrated.process.returncode, migrated.errors) == (0, "")
        assert re.fullmatch(r"schema version \d+\n", migrated.output)
    assert empty_database.stored() == []


def test_reseed_says_the_next_seq_and_begins_a_new_epoch(database: TestDatabase) -> None:
    database.insert(3)
    [(before,)] = database.execute("SELECT epoch::text FROM label_stream")
    reseeded = ran("reseed", "--above=500", "--dsn", database.dsn)
    assert (reseeded.process.returncode, reseeded.errors) == (0, "")
    [(after,)] = database.execute("SELECT epoch::text FROM label_stream")
    assert reseeded.output == f"the next seq is 501, the epoch is {after}\n"
    assert after != before
    assert database.insert() == [501]


def test_reseed_is_refused_while_a_server_runs_unless_it_is_forced(database: TestDatabase) -> None:
    arguments = ("reseed", "--above=500", "--dsn", database.dsn)
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn) as server:
        server.url()
        status, said = failure(ran(*arguments))
        assert status == 2
        assert (
            "--dsn: got \"a database with other sessions of sse-labels, PostgreSQL's proc" in said
        )
        assert "expected one on which no server and no mirror runs; stop them, or give" in said
        assert database.insert() == [1]
        # Every role sees how a session calls itself, also one that sees nothing else of it.
        role = f"stranger_{database.name}"
        with database.connect().cursor() as cursor:
            cursor.execute(f"CREATE ROLE {role}; SET ROLE {role}")
            cursor.execute("SELECT query FROM pg_stat_activity WHERE application_name='sse-labels'")
            seen = cursor.fetchall()
            cursor.execute(f"RESET ROLE; DROP ROLE {role}")
        assert set(seen) == {("<insufficient privilege>",)}
        assert ran(*arguments, "--force").process.returncode == 0
        assert database.insert() == [501]


def test_publishing_is_off_only_where_nobody_may_publish(
    database: TestDatabase, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    add_token(file, "alice")
    off = "publishing is off: neither --publish-token"
    for more, said in (((), True), ((f"--publish-tokens-file={file}",), False)):
        with running("serve", *QUICK_SERVER, "--dsn", database.dsn, *more) as server:
            server.url()
        assert (off in server.errors) is said


def test_package_runs_as_the_program() -> None:
    same = [
        subprocess.run([*call, "--help"], env=environment(), capture_output=True, check=True)
        for call in (command(), [sys.executable, "-m", "sse_labels"])
    ]
    assert same[0].stdout == same[1].stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "sse_labels", "tail", "nowhere"], env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert (wrong.returncode, wrong.stderr[:12]) == (2, "sse-labels: ")


def test_reseed_changes_nothing_when_it_is_asked_for_wrongly(
    database: TestDatabase, empty_database: TestDatabase
) -> None:
    ours, empty = ("reseed", "--dsn", database.dsn), ("reseed", "--dsn", empty_database.dsn)
    cases = {
        ours: "--above: not given, expected the highest seq",
        (*ours, "--above=0"): "--above: got '0', expected a whole number",
        (*empty, "--above=5"): "--dsn: got 'a database without a label",
    }
    refused = called_all([(arguments, {}) for arguments in cases])
    for program, complaint in zip(refused, cases.values(), strict=True):
        status, said = failure(program)
        assert (status, complaint in said) == (2, True), said
    assert database.insert() == [1]
