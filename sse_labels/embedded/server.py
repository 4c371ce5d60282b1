"""The server for its users: start, use, stop.

Promises: each user that has started the server holds a claim. The user that releases the last claim
stops the server. After `keep_running` the server is restarted whenever it has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import platformdirs
import psycopg2

from sse_labels.backoff import Backoff
from sse_labels.embedded.account import lock, locked, unlock
from sse_labels.embedded.cluster import DATABASE, PORT, Cluster
from sse_labels.embedded.postmaster import POLL_SECONDS, START_SECONDS, Postmaster
from sse_labels.errors import ConfigError, DatabaseUnavailable, SseLabelsError

logger = logging.getLogger(__name__)

#: The default of `max_connections`.
EMBEDDED_MAX_CONNECTIONS = 200

#: Time between two checks after `keep_running`: two small reads, in /proc and in the directory.
CHECK_SECONDS = 0.5
#: The pauses before a restart grow from the first to the longest.
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 15.0
#: After a server has run this long, the pauses start again with the first.
STEADY_SECONDS = 30.0

_SETTINGS = {
    # No TCP: only users who can enter the socket's directory (0700) can connect. All are trusted.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "track_commit_timestamp": "on",
    "max_connections": str(EMBEDDED_MAX_CONNECTIONS),
    # A line every five minutes would fill most of the log.
    "log_checkpoints": "off",
}


class EmbeddedPostgres:
    """A PostgreSQL server in `data_dir`, shared by all users of this directory.

    `settings` are server settings (`name: value` as in postgresql.conf) that replace the defaults
    above. They cannot change the socket's path and the port. They hold only when this object
    launches the server, not when it joins a running one.

    All calls block (start 0.1 s, the first about 1 s, crash recovery up to 120 s): use a thread.
    """

    def __init__(self, data_dir: Path, *, settings: Mapping[str, str] | None = None) -> None:
        # Two spellings of one directory must use the same locks and the same socket.
        self.data_dir = Path(os.path.realpath(data_dir.expanduser()))
        self._settings = {**_SETTINGS, **(settings or {})}
        self._cluster = Cluster(self.data_dir)
        self._postmaster = Postmaster(self._cluster)
        self._start_lock = self.data_dir / "postgres.start.lock"
        self._claim: int | None = None
        self._has_started = False
        self._keeper: threading.Thread | None = None
        self._ending = threading.Event()
        #: Called, in the keeper's thread, after each restart.
        self.on_restart: Callable[[], object] = lambda: None

    @property
    def dsn(self) -> str:
        """The URI for libpq: user `postgres`, database `sse_labels`, a Unix socket."""
        host = quote(os.fsencode(self._postmaster.socket_dir), safe="")
        return f"postgresql://postgres@/{DATABASE}?host={host}&port={PORT}"

    def runs(self) -> bool:
        """Return whether the server runs; raise `ConfigError` when the directory cannot be read."""
        try:
            if not self.data_dir.exists():
                return False
            self._cluster.refuse_foreign()
            return self._postmaster.is_alive()
        except OSError as error:
            raise self._cluster.unusable(error) from error

    def start(self) -> bool:
        """Return when the server accepts connections at `dsn`; make and launch it when needed.

        Returns whether it launched the server. It may be called again at any time, for example
        after the server was killed; a later call makes no new data directory. When it fails, it
        releases the claim as `stop` does.

        Raises `ConfigError` when the data directory cannot be used (rights, a file with its name,
        data of another PostgreSQL, a full disk). Raises `DatabaseUnavailable`, with the server's
        message, when the server does not accept connections within 120 s.
        """
        began = time.monotonic()
        try:
            if self._has_started:
                # The disk may be unmounted. A new empty database would hide all data.
                self._cluster.find_pgdata()
            self._cluster.make_directory()
            self._cluster.refuse_foreign()
            with locked(self._start_lock):
                if self._claim is None:
                    self._claim = lock(self.data_dir / "postgres.lock", fcntl.LOCK_SH)
                try:
                    launched = self._bring_up()
                except BaseException:
                    self._leave()
                    raise
        except OSError as error:
            raise self._cluster.unusable(error) from error
        seconds = time.monotonic() - began
        logger.info(
            "embedded PostgreSQL answers", extra={"data_dir": self.data_dir, "seconds": seconds}
        )
        self._has_started = True
        return launched

    def keep_running(self) -> None:
        """Restart the server, in a thread, whenever it has died, until `stop`."""
        self._ending.clear()
        self._keeper = threading.Thread(target=self._keep, name="embedded-postgres", daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        pauses = Backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        began = time.monotonic()
        while not self._ending.wait(CHECK_SECONDS):
            if not self._is_dead():
                continue
            if time.monotonic() - began >= STEADY_SECONDS:
                pauses.reset()
            pause = pauses.next()
            logger.error(
                "embedded PostgreSQL is not running, it is restarted",
                extra={"data_dir": self.data_dir, "next_start_seconds": pause},
            )
            if self._ending.wait(pause):
                break
            try:
                if self.start():
                    self.on_restart()
            except SseLabelsError as error:
                if not self._ending.is_set():
                    logger.error("embedded PostgreSQL was not restarted", extra={"error": error})
            except Exception:
                # For example while the wheel is being replaced. Only this thread tries again.
                logger.exception("embedded PostgreSQL was not restarted")
            began = time.monotonic()

    def _is_dead(self) -> bool:
        with contextlib.suppress(OSError):
            # A server in a container that shares the directory has no pid here, but answers.
            return not self._postmaster.is_alive() and self._refusal() is not None
        return True

    def stop(self) -> None:
        """Release the claim; stop the server when no one else uses the data directory.

        Never raises. The next user joins a server that could not be stopped.
        """
        self._ending.set()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        if self._claim is None:
            return
        try:
            with locked(self._start_lock):
                self._leave()
        except OSError as error:
            logger.warning("embedded PostgreSQL was left running", extra={"error": error})
            self._release_claim()

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _leave(self) -> None:
        if self._claim is None:  # Released in `_bring_up`.
            return
        try:
            with contextlib.suppress(BlockingIOError):  # Another user holds a claim.
                fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._postmaster.stop()
        finally:
            self._release_claim()

    def _release_claim(self) -> None:
        if self._claim is not None:
            unlock(self._claim)
        self._claim = None

    def _bring_up(self) -> bool:
        if not self._postmaster.is_alive():
            self._cluster.tidy()
        self._cluster.make_pgdata()
        self._postmaster.secure_socket_dir()
        deadline = time.monotonic() + START_SECONDS
        launched = False
        while refused := self._refusal():
            if self._keeper is not None and self._ending.is_set():
                raise DatabaseUnavailable("told to stop")
            if time.monotonic() > deadline:
                # The server is not stopped: its recovery would restart at each start, forever.
                self._release_claim()
                raise DatabaseUnavailable(
                    f"PostgreSQL in {self.data_dir} does not accept connections; it may still be "
                    f"recovering, start again to wait longer. It said: {refused}"
                ) from refused
            if f'database "{DATABASE}" does not exist' in str(refused):
                self._cluster.make_database(self._postmaster.socket_dir)
            # Only a running server answers "FATAL:  …". It may run in a container that shares the
            # directory, where pids differ. A second server would destroy the data.
            elif "FATAL:  " not in str(refused) and not self._postmaster.is_alive():
                if launched:
                    raise DatabaseUnavailable(
                        f"PostgreSQL in {self.data_dir} died as soon as it had started; "
                        f"{self._cluster.log} may say why"
                    )
                launched = self._postmaster.launch(self._settings)
            else:
                # It starts, recovers, or stops because its last user was killed.
                time.sleep(POLL_SECONDS)
        return launched

    def _refusal(self) -> psycopg2.OperationalError | None:
        """Return the error of an attempt to connect; None when it succeeds."""
        try:
            psycopg2.connect(self.dsn, connect_timeout=10).close()
        except psycopg2.OperationalError as error:
            return error
        return None


def default_data_dir() -> Path:
    """Return the default data directory; raise `ConfigError` when this user has no home."""
    if os.geteuid() == 0:
        return Path("/var/lib/sse-labels")  # The system user cannot enter root's home.
    # Without HOME and an entry in /etc/passwd platformdirs raises; its older releases return "~/…".
    with contextlib.suppress(RuntimeError):
        place = platformdirs.user_data_path("sse-labels")
        if place.is_absolute():
            return place
    raise ConfigError("--data-dir", None, "a directory: this user has no home to keep one in")
