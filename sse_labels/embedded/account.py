"""The account of the PostgreSQL server, and files that only this program's user can open.

Promises: PostgreSQL, which refuses root, never runs as root. It runs as the user of this process,
or as the system user `sse-labels` when that is root. The only change to the system is to make this
user when it is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sse_labels.errors import ConfigError, DatabaseUnavailable

SYSTEM_USER = "sse-labels"
_USERADD = "useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin"
_USERADD_LOCK = Path("/run/sse-labels.lock")

#: The whole environment of the server: no token, and no PGPORT, PGOPTIONS or PGSERVICE.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


@dataclass(frozen=True)
class Account:
    """A user of this machine as which programs can be run."""

    name: str
    uid: int
    gid: int

    def run(self, *command: str | Path, cwd: Path, log: Path | None = None) -> tuple[int, str]:
        """Run a program as this account; return its exit code and its output.

        The output is also appended to `log`. Processes that the program leaves running continue to
        write there. Raises `DatabaseUnavailable` when the program cannot be run.
        """
        # A file, because processes that the program leaves running would keep a pipe open.
        with os.fdopen(open_private(log), "a+b") if log else tempfile.TemporaryFile() as output:
            start = output.seek(0, os.SEEK_END)
            try:
                code = subprocess.run(  # noqa: S603
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=_ENVIRONMENT,
                    user=self.uid,
                    group=self.gid,
                    extra_groups=[] if os.geteuid() == 0 else None,
                    # Ctrl-C is for this process: at SIGINT pg_ctl stops the server that it starts.
                    start_new_session=True,
                ).returncode
            except OSError as error:
                sentence = f"cannot run {command[0]} as user {self.name}: {error.strerror}"
                raise DatabaseUnavailable(sentence) from error
            output.seek(start)
            return code, os.fsdecode(output.read()).strip()

    def first_closed(self, paths: Iterable[Path]) -> Path | None:
        """Return the first of `paths` that the account may neither enter nor run."""
        # Tested as that account, not computed from modes, because of ACLs.
        script = 'for p; do test -x "$p" || { printf %s "$p"; exit; }; done'
        _, closed = self.run("/bin/sh", "-c", script, "sh", *paths, cwd=Path("/"))
        return Path(closed) if closed else None


def trusted_owners() -> set[int]:
    """Return the users whose files are trusted: root, this user, and the server's account."""
    owners = {0, os.geteuid()}
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            owners.add(pwd.getpwnam(SYSTEM_USER).pw_uid)
    return owners


def server_account() -> Account:
    """Return the server's account; raise `ConfigError` when the user cannot be made."""
    if os.geteuid() != 0:
        return Account(str(os.geteuid()), os.geteuid(), os.getegid())
    try:
        found = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        found = _make_system_user()
    return Account(SYSTEM_USER, found.pw_uid, found.pw_gid)


def _make_system_user() -> pwd.struct_passwd:
    try:
        # Two useradds at the same time both succeed. The second replaces the uid of the first, and
        # that uid may own data already (test_system_user_needed_by_several_at_once_is_made_once).
        with locked(_USERADD_LOCK):
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(SYSTEM_USER)
            subprocess.run([*_USERADD.split(), SYSTEM_USER], check=True)  # noqa: S603
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, subprocess.CalledProcessError) as error:
        expected = "a user that PostgreSQL can run as: run useradd, or start as an ordinary user"
        raise ConfigError("system user", SYSTEM_USER, f"{expected} ({error})") from error


def open_private(path: Path) -> int:
    """Open a file for reading and appending; make it when it is missing."""
    # Follow no link: the account may own the directory, and must not make root write elsewhere.
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def lock(path: Path, how: int = fcntl.LOCK_EX) -> int:
    """Wait for the lock; return its descriptor for `unlock`. A killed holder frees it at once."""
    held = open_private(path)
    fcntl.flock(held, how)
    return held


def unlock(held: int) -> None:
    """Release the lock."""
    # Closing is not enough: a child between fork and exec may still have the descriptor open.
    fcntl.flock(held, fcntl.LOCK_UN)
    os.close(held)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock and hold it during the block."""
    held = lock(path)
    try:
        yield
    finally:
        unlock(held)
