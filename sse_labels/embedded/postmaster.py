"""The server's process and its socket: it is launched, recognised and stopped here.

Promises: the pid in a file is never trusted without a check of the process. Only the server's
account and root can enter the socket's directory; both are trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from sse_labels.embedded.cluster import PORT, Cluster

POLL_SECONDS = 0.02
#: Crash recovery replays the write-ahead log since the last checkpoint: seconds, rarely minutes.
START_SECONDS = 120.0

_SOCKET_NAME = f".s.PGSQL.{PORT}"
#: sockaddr_un.sun_path holds 108 bytes with the closing zero (unix(7)).
_SOCKET_PATH_MAX_BYTES = 107
#: The message while backends of a killed server still end; until then no new server may start.
_STILL_IN_USE = "pre-existing shared memory block"


class Postmaster:
    """The server's process; all methods are called under the start lock."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.socket_dir = cluster.pgdata
        path = os.fsencode(self.socket_dir / _SOCKET_NAME)
        # For libpq a comma separates two hosts.
        if len(path) > _SOCKET_PATH_MAX_BYTES or b"," in path:
            name = f"sse-labels-{hashlib.sha256(path).hexdigest()[:16]}"
            # Not TMPDIR: all users of one server need the same path.
            self.socket_dir = Path("/tmp", name)  # noqa: S108
        self._pid_file = cluster.pgdata / "postmaster.pid"
        self._socket_lock = self.socket_dir / f"{_SOCKET_NAME}.lock"

    def is_alive(self) -> bool:
        """Return whether the process that postmaster.pid names is this directory's server."""
        return self._serves_here(_pid_in(self._pid_file))

    def secure_socket_dir(self) -> None:
        """Make it a private directory of the account; raise `ConfigError` when it is another's."""
        if self.socket_dir == self._cluster.pgdata:
            return
        account = self._cluster.account
        self.socket_dir.mkdir(0o700, exist_ok=True)
        if self.socket_dir.lstat().st_uid == os.geteuid():
            os.chown(self.socket_dir, account.uid, account.gid, follow_symlinks=False)
        found = self.socket_dir.lstat()
        # In /tmp any user may have made it first, to read or change the connections.
        if found.st_mode != stat.S_IFDIR | 0o700 or found.st_uid != account.uid:
            raise self._cluster.refusal(
                f"a shorter path without a comma; the socket does not fit into it, and "
                f"{self.socket_dir} is not a private directory of the user {account.name}"
            )

    def launch(self, settings: Mapping[str, str]) -> bool:
        """Start the process; return whether it has started or may still start.

        False: processes of a killed server still use the data, so the caller tries again.
        """
        for claim in (self._pid_file, self._socket_lock):
            # The server refuses to start ("is another postmaster running?") when the pid of a dead
            # server now belongs to another process of the user, or to a zombie. Zombies stay when
            # this process is the first one of a container. A free pid is no problem for the server.
            pid = _pid_in(claim)
            if Path(f"/proc/{pid}").exists() and not self._serves_here(pid):
                claim.unlink()
        settings = {
            **settings,
            "port": str(PORT),
            # A list of quoted names (the manual: unix_socket_directories).
            "unix_socket_directories": '"' + str(self.socket_dir).replace('"', '""') + '"',
        }
        options = " ".join(f"-c {shlex.quote(f'{name}={settings[name]}')}" for name in settings)
        # pg_ctl gives the options and the directory's name, only in double quotes, to a shell. With
        # a relative name the shell does not see a `$` in the path of the data directory.
        what = ("--pgdata", self._cluster.pgdata.name, "--options", options)
        how = ("start", "--wait", f"--timeout={START_SECONDS:.0f}")
        code, said = self._cluster.run("pg_ctl", *how, *what, log=self._cluster.log)
        if code == 0 or self.is_alive():  # Alive without code 0: a long recovery.
            return True
        if _STILL_IN_USE not in said:
            raise self._cluster.failure("start", said)
        return False

    def stop(self) -> None:
        """Stop the server, which disconnects all clients; wait for its end."""
        pid = _pid_in(self._pid_file)
        if not self._serves_here(pid):
            return
        os.kill(pid, signal.SIGINT)  # "Fast shutdown" (the manual: Shutting Down the Server).
        while self._serves_here(pid):
            time.sleep(POLL_SECONDS)
        if self.socket_dir != self._cluster.pgdata:
            with contextlib.suppress(OSError):
                self.socket_dir.rmdir()

    def _serves_here(self, pid: int) -> bool:
        # pg_ctl and the server take any process with that pid and the same user for the server.
        # After a crash another process may have the pid. Only the server has PGDATA as its working
        # directory; a zombie has no working directory.
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cwd").samefile(self._cluster.pgdata)
        return False


def _pid_in(claim: Path) -> int:
    """Return the pid in a server's lock file; 0 when there is none. No process has pid 0."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        return int(claim.read_bytes().split()[0])
    return 0
