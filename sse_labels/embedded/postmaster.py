"""The server's process and its socket: launching it, knowing it, stopping it.

Promises: a pid is never taken for the server because a file says so, and only the server's account
(and root) can enter the socket's directory: whoever can is trusted.
Does not belong here: who uses the server, and whether it answers.
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
#: A killed server's backends notice within moments, and until then no new one may touch the data.
_STILL_IN_USE = "pre-existing shared memory block"


class Postmaster:
    """The process that serves the cluster; all is called under the start lock, one at a time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.socket_dir = cluster.pgdata
        path = os.fsencode(self.socket_dir / _SOCKET_NAME)
        # libpq takes a comma for the start of the next host's name.
        if len(path) > _SOCKET_PATH_MAX_BYTES or b"," in path:
            name = f"sse-labels-{hashlib.sha256(path).hexdigest()[:16]}"
            # Not TMPDIR: all users of one server must agree on the place.
            self.socket_dir = Path("/tmp", name)  # noqa: S108
        self._pid_file = cluster.pgdata / "postmaster.pid"
        self._socket_lock = self.socket_dir / f"{_SOCKET_NAME}.lock"

    def is_alive(self) -> bool:
        """Tell whether the process that postmaster.pid names is this directory's server."""
        return self._serves_here(_pid_in(self._pid_file))

    def secure_socket_dir(self) -> None:
        """Make it the account's own; raise `ConfigError` when it is somebody else's."""
        if self.socket_dir == self._cluster.pgdata:
            return
        account = self._cluster.account
        self.socket_dir.mkdir(0o700, exist_ok=True)
        if self.socket_dir.lstat().st_uid == os.geteuid():
            os.chown(self.socket_dir, account.uid, account.gid, follow_symlinks=False)
        found = self.socket_dir.lstat()
        # In /tmp everybody may have made it before us, to stand between us and the server.
        if found.st_mode != stat.S_IFDIR | 0o700 or found.st_uid != account.uid:
            raise self._cluster.refusal(
                f"a shorter path without a comma; the socket does not fit into it, and "
                f"{self.socket_dir} is not a private directory of the user {account.name}"
            )

    def launch(self, settings: Mapping[str, str]) -> bool:
        """Start the process; return whether it has started, or may still do so.

        False: what a killed server has left running still uses the data; to be tried again.
        """
        for claim in (self._pid_file, self._socket_lock):
            # The server would refuse to start ("is another postmaster running?") when a dead one's
            # pid is a neighbour's, or a zombie's, which stays where we are a container's first
            # process. A pid that is free it finds stale by itself.
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
        # pg_ctl hands the options to a shell, and the directory's name too, in double quotes only:
        # a relative name keeps a `$` in the data directory's path out of it.
        what = ("--pgdata", self._cluster.pgdata.name, "--options", options)
        how = ("start", "--wait", f"--timeout={START_SECONDS:.0f}")
        code, said = self._cluster.run("pg_ctl", *how, *what, log=self._cluster.log)
        if code == 0 or self.is_alive():  # The latter: a long recovery.
            return True
        if _STILL_IN_USE not in said:
            raise self._cluster.failure("start", said)
        return False

    def stop(self) -> None:
        """Have it disconnect everybody and stop; wait for that."""
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
        # pg_ctl and the server itself take any living process of the same user for the server:
        # after a crash, that number may be a neighbour's. Its working directory tells them apart;
        # a process that has ended, a zombie too, has none.
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cwd").samefile(self._cluster.pgdata)
        return False


def _pid_in(claim: Path) -> int:
    """Return the pid in a server's lock file; 0, which no process has, without one."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        return int(claim.read_bytes().split()[0])
    return 0
