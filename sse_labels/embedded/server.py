"""The server as its users see it: start, use, stop.

Promises: whoever has started it holds a claim, and the last one to give it up stops the server.
Whoever asked for it to be kept running finds it restarted when it has died, for whatever reason.
Does not belong here: how anything is made, run or found.
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

#: Unless `settings` say more.
EMBEDDED_MAX_CONNECTIONS = 200

#: How often the kept server is looked at: two small reads in /proc and the data directory.
CHECK_SECONDS = 0.5
#: The pauses before a restart grow from the first to the longest …
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 15.0
#: … and begin anew with a server that lived so long.
STEADY_SECONDS = 30.0

_SETTINGS = {
    # No TCP: whoever may enter the socket's directory (0700) is trusted, nobody else gets there.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "track_commit_timestamp": "on",
    "max_connections": str(EMBEDDED_MAX_CONNECTIONS),
    # One line every five minutes would be most of the log.
    "log_checkpoints": "off",
}


class EmbeddedPostgres:
    """A PostgreSQL server in `data_dir`, shared by all that use the same directory.

    `settings` are server settings (`name: value` as in postgresql.conf) over the defaults above;
    the socket's place and the port stay ours. They hold when this call starts the server, not when
    it joins one.

    All calls block (start 0.1 s, the first about 1 s, crash recovery up to 120 s): use a thread.
    """

    def __init__(self, data_dir: Path, *, settings: Mapping[str, str] | None = None) -> None:
        # Two spellings of one directory must meet at the same locks and the same socket.
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
        """The libpq connection URI: user `postgres`, database `sse_labels`, a Unix socket."""
        host = quote(os.fsencode(self._postmaster.socket_dir), safe="")
        return f"postgresql://postgres@/{DATABASE}?host={host}&port={PORT}"

    def runs(self) -> bool:
        """Tell whether somebody has started it; raise `ConfigError` when that cannot be seen."""
        try:
            if not self.data_dir.exists():
                return False
            self._cluster.refuse_foreign()
            return self._postmaster.is_alive()
        except OSError as error:
            raise self._cluster.unusable(error) from error

    def start(self) -> bool:
        """Return when the server accepts connections at `dsn`; make and start it when needed.

        The value is whether it launched one. May be called again at any time, e.g. after the server
        was killed; then no data directory is made anew. Failing, it leaves like `stop`.

        Raises `ConfigError` when the data directory cannot be used (rights, a file in its place,
        another PostgreSQL's data, a full disk), and `DatabaseUnavailable` with what the server
        said when it does not come up within 120 s.
        """
        began = time.monotonic()
        try:
            if self._has_started:
                # Its disk may be unmounted: an empty database in its place would lose everything.
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
        """Restart the server, from a thread, whenever it has died, until `stop`."""
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
                # Such as a wheel that is being replaced: nobody else would try again.
                logger.exception("embedded PostgreSQL was not restarted")
            began = time.monotonic()

    def _is_dead(self) -> bool:
        with contextlib.suppress(OSError):
            # A server in a container that shares the directory has no pid here, and answers.
            return not self._postmaster.is_alive() and self._refusal() is not None
        return True

    def stop(self) -> None:
        """Give up this use of the server; stop it when nobody else uses the data directory.

        Never raises: what a server that cannot be stopped leaves is joined by the next user.
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
            self._give_up_claim()

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _leave(self) -> None:
        if self._claim is None:  # Given up in `_bring_up`.
            return
        try:
            with contextlib.suppress(BlockingIOError):  # Somebody else holds a claim.
                fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._postmaster.stop()
        finally:
            self._give_up_claim()

    def _give_up_claim(self) -> None:
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
                # Not stopped: its recovery would begin anew at the next start, perhaps for ever.
                self._give_up_claim()
                raise DatabaseUnavailable(
                    f"PostgreSQL in {self.data_dir} does not accept connections; it may still be "
                    f"recovering, start again to wait on. It said: {refused}"
                ) from refused
            if f'database "{DATABASE}" does not exist' in str(refused):
                self._cluster.make_database(self._postmaster.socket_dir)
            # "FATAL:  …" is the answer of a server that runs, perhaps in a container that shares
            # the directory: its pid means nothing here, and a second one would destroy the data.
            elif "FATAL:  " not in str(refused) and not self._postmaster.is_alive():
                if launched:
                    raise DatabaseUnavailable(
                        f"PostgreSQL in {self.data_dir} died as soon as it had started; "
                        f"{self._cluster.log} may say why"
                    )
                launched = self._postmaster.launch(self._settings)
            else:
                # Starting up, recovering, or stopping because its last user has just been killed.
                time.sleep(POLL_SECONDS)
        return launched

    def _refusal(self) -> psycopg2.OperationalError | None:
        """Return why the server does not let us in; None when it does."""
        try:
            psycopg2.connect(self.dsn, connect_timeout=10).close()
        except psycopg2.OperationalError as error:
            return error
        return None


def default_data_dir() -> Path:
    """Return the place for the data when none is given; raise `ConfigError` when there is none."""
    if os.geteuid() == 0:
        return Path("/var/lib/sse-labels")  # The system user reaches it, unlike root's home.
    # Without HOME and without an entry in /etc/passwd it raises; earlier releases return "~/…".
    with contextlib.suppress(RuntimeError):
        place = platformdirs.user_data_path("sse-labels")
        if place.is_absolute():
            return place
    raise ConfigError("--data-dir", None, "a directory: this user has no home to keep one in")
