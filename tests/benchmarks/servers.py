"""How each server is started, what it can do, and where it is published to.

The service runs whole: `sse-labels serve` on a database of its own in a real PostgreSQL, the
embedded one, with its settings as they come. PostgreSQL stands on the servers' core too, and its
CPU is told apart. The peers do what their documentation shows; what they cannot do is left out.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import itertools
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from sse_labels.embedded import EmbeddedPostgres

from benchmarks import cores, labels, measure, nchan
from benchmarks.load import CLIENTS_PER_ADDRESS
from support.database import reachable_directory
from support.nginx import nginx
from support.program import command, environment, free_port

HOST = "127.0.0.1"
SERVICE = "service"
#: Only where publishing is paced. Nchan joins what waits for a client when messages come faster
#: than it sends them, which a publisher that waits for each answer never lets happen.
NCHAN_SERIAL = "nchan-serial"
#: The service behind nginx, with the site that operators are given.
BEHIND_NGINX = "service, nginx"
#: What a table is filled with: events each of another key; events that replace one another;
#: the rows of Ozone's table, in which each key has one.
#: And events of few keys, of which the table holds nothing but old ones until its end.
EVENTS, STATE, OZONE, KEYS = "events", "state", "ozone", "keys"
START_SECONDS = 30.0
FILL_ROWS = 100_000

_names = itertools.count()


class CannotRun(Exception):
    """Why a server is left out."""


@dataclass
class Server:
    """One that runs. `batch`: how many events one publishing request may bring."""

    name: str
    version: str
    process: subprocess.Popen[bytes]
    port: int
    path: str
    target: dict[str, Any]
    how: str
    batch: int = 500
    #: Clients that may come from one address.
    per_address: int = CLIENTS_PER_ADDRESS

    def request(self, query: str = "", cursor: str | None = None) -> str:
        """The request of one subscriber."""
        resume = "" if cursor is None else f"Last-Event-ID: {cursor}\r\n"
        return (
            f"GET {self.path}{query} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n"
            f"Accept: text/event-stream\r\n{resume}\r\n"
        )

    def cpu(self) -> float:
        """CPU seconds of the server so far."""
        return measure.cpu_seconds(self.process.pid)

    def database_cpu(self) -> float:
        """CPU seconds of its PostgreSQL so far."""
        return 0.0

    def proxy_cpu(self) -> float | None:
        """CPU seconds of the proxy before it so far; None without one."""
        return None

    def memory_kib(self, key: str = "VmRSS") -> int:
        """Its resident memory."""
        return measure.memory_kib(measure.family(self.process.pid), key)

    def forget_peak(self) -> None:
        """Let the most memory used begin anew."""
        measure.forget_peak(measure.family(self.process.pid))

    def from_start(self) -> str:
        """The request of a subscriber that wants all there is."""
        return self.request("?cursor=0")

    def event_ids(self, count: int) -> list[str]:
        """The ids of the first `count` events that it keeps."""
        raise NotImplementedError

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask it something."""
        return ask(self.port, path)


@dataclass
class Service(Server):
    """Ours, with what its scenarios need of the database."""

    dsn: str = ""
    postmaster: int = 0
    token: str = ""
    log: Path = field(default_factory=Path)
    core: int = 0

    def database_cpu(self) -> float:
        return measure.cpu_seconds(self.postmaster)

    def metrics(self) -> dict[str, float]:
        """Its counters and gauges by name."""
        lines = self.get("/metrics")[1].decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("sse_labels_"): float(number) for name, number in pairs}

    def rows(self) -> int:
        """How many labels the table holds."""
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT count(*) FROM label")
            found: int = cursor.fetchone()[0]
            return found

    def in_force(self) -> list[int]:
        """The seqs of the labels in force, by SQL of the benchmark's own."""
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection:
            cursor = connection.cursor()
            cursor.execute(labels.IN_FORCE)
            return [seq for (seq,) in cursor.fetchall()]

    def publish_head(self, body: str) -> str:
        """A POST /labels with this body."""
        return (
            f"POST /labels HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n"
            f"Authorization: Bearer {self.token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )

    def event_ids(self, count: int) -> list[str]:
        return [str(seq) for seq in range(1, count + 1)]

    def start(self) -> None:
        """Start it on its database, again when it was stopped."""
        with self.log.open("ab") as log, cores.on(self.core):
            self.process = subprocess.Popen(
                [*command(), "serve", "--dsn", self.dsn, "--port", str(self.port)],
                env=environment(SSE_LABELS_PUBLISH_TOKEN=self.token),
                stdout=log,
                stderr=log,
                cwd="/",
            )
        wait_for(lambda: self.get("/health/ready")[0] == 200, self.process, self.log)

    def stop(self) -> None:
        """Stop it and forget nothing."""
        end(self.process)


@dataclass
class Proxied(Service):
    """Ours, asked through nginx."""

    proxy: int = 0
    direct_port: int = 0

    def get(self, path: str) -> tuple[int, bytes]:
        # Not through nginx: its share of each address is taken by the streams.
        return ask(self.direct_port, path)

    def proxy_cpu(self) -> float | None:
        return measure.cpu_seconds(self.proxy)


class Nchan(Server):
    """Nchan, which keeps messages in memory."""

    def from_start(self) -> str:
        return self.request().replace(f"GET {self.path} ", "GET /history ")

    def event_ids(self, count: int) -> list[str]:
        ids: list[str] = []
        with socket.create_connection((HOST, self.port), timeout=10) as connection:
            connection.sendall(self.from_start().encode())
            data = b""
            while len(ids) < count:
                data += connection.recv(1 << 16)
                ids = [match[1].decode() for match in labels.EVENT.finditer(data)]
        return ids


@dataclass
class Place:
    """What servers are started with: the cores, and the PostgreSQL of the whole run."""

    server_core: int
    postgres: EmbeddedPostgres

    @property
    def postmaster(self) -> int:
        pid_file = self.postgres.data_dir / "postgres" / "postmaster.pid"
        return int(pid_file.read_text().split()[0])


@contextmanager
def place(server_core: int) -> Iterator[Place]:
    """Run a PostgreSQL on the servers' core meanwhile."""
    with reachable_directory() as directory:
        postgres = EmbeddedPostgres(directory)
        with cores.on(server_core):
            postgres.start()
        try:
            yield Place(server_core, postgres)
        finally:
            postgres.stop()


@contextmanager
def service(place: Place, history: int = 0, kind: str = EVENTS) -> Iterator[Service]:
    """The service on a fresh database, with so many labels of one kind in it."""
    name = f"bench_{next(_names)}"
    dsn = make_dsn(place.postgres.dsn, dbname=name)
    with _sql(place.postgres.dsn) as run, tempfile.TemporaryDirectory() as folder:
        run(f"CREATE DATABASE {name}")
        server = Service(
            SERVICE,
            "sse_labels " + importlib.metadata.version("sse-labels"),
            None,  # type: ignore[arg-type]  # started below
            free_port(),
            "/stream",
            {"kind": "sql", "dsn": dsn},
            "SQL INSERTs, each statement a transaction",
            dsn=dsn,
            postmaster=place.postmaster,
            token=secrets.token_urlsafe(24),
            log=Path(folder) / "log",
            core=place.server_core,
        )
        try:
            if history:
                _fill(place, dsn, history, kind)
            server.start()
            try:
                yield server
            finally:
                server.stop()
        finally:
            run(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def behind_nginx(place: Place) -> Iterator[Proxied]:
    """The service, and nginx on the same core before it."""
    if not Path(nchan.NGINX).exists():
        raise CannotRun("nginx is not installed (Debian: apt-get install nginx)")
    with service(place) as direct, contextlib.ExitStack() as stack:
        with cores.on(place.server_core):
            front = stack.enter_context(nginx(direct.port))
        version = subprocess.run([nchan.NGINX, "-v"], capture_output=True, text=True).stderr.strip()
        behind = {
            **vars(direct),
            "name": BEHIND_NGINX,
            "version": f"{direct.version}, {version.removeprefix('nginx version: ')}",
            "port": front.port,
            "per_address": front.per_address,
        }
        server = Proxied(**behind, proxy=front.process.pid, direct_port=direct.port)
        wait_for(lambda: ask(front.port, "/health/ready")[0] == 200, front.process, direct.log)
        yield server


def _fill(place: Place, dsn: str, history: int, kind: str) -> None:
    if kind != OZONE:
        with cores.on(place.server_core):
            subprocess.run(
                [*command(), "migrate", "--dsn", dsn, "--log-level", "error"],
                env=environment(), stdout=subprocess.DEVNULL, check=True,
            )  # fmt: skip
    with _sql(dsn) as run:
        if kind == OZONE:
            run(labels.OZONE_TABLES)
            run(labels.FILL_OZONE, (history,))
        elif kind == STATE:
            run(labels.FILL_STATE, (history // 5,))
        else:
            fill = labels.FILL_KEYS if kind == KEYS else labels.FILL
            with _without_indexes(dsn):
                for first in range(0, history, FILL_ROWS):
                    run(fill, (first, min(history, first + FILL_ROWS) - 1))
        # Not later, when it would be measured.
        run("VACUUM (FREEZE, ANALYZE) label")
        run("CHECKPOINT")


@contextmanager
def _without_indexes(dsn: str) -> Iterator[None]:
    """Make the indexes of the table when it is full, in a fraction of the time."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'label'"
            " AND indexname <> 'label_pkey'"
        )
        indexes = cursor.fetchall()
        for name, _ in indexes:
            cursor.execute(f"DROP INDEX {name}")
        yield
        for _, definition in indexes:
            cursor.execute(definition)


@contextmanager
def _sql(dsn: str) -> Iterator[Callable[..., None]]:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    try:
        yield connection.cursor().execute
    finally:
        connection.close()


@contextmanager
def _python_peer(place: Place, name: str, script: str, packages: list[str]) -> Iterator[Server]:
    """A peer in Python: the program beside this file."""
    try:
        version = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in packages)
    except importlib.metadata.PackageNotFoundError as error:
        raise CannotRun(f"not installed: {error.name}") from None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if "uvicorn" in packages:
            version += ", uvloop " + importlib.metadata.version("uvloop")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("ab") as output, cores.on(place.server_core):
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(script)), str(port)],
                stdout=output,
                stderr=output,
            )
        server = Server(
            name, version, process, port, "/stream",
            {"kind": "post", "host": HOST, "port": port, "path": "/publish"},
            "POSTs, broadcast in the process to a queue for each connection",
        )  # fmt: skip
        try:
            wait_for(lambda: server.get("/nothing")[0] == 404, process, log)
            yield server
        finally:
            end(process)


@contextmanager
def aiohttp_sse(place: Place) -> Iterator[Server]:
    """aiohttp-sse."""
    packages = ["aiohttp-sse", "aiohttp"]
    with _python_peer(place, "aiohttp-sse", "peer_aiohttp_sse.py", packages) as server:
        yield server


@contextmanager
def sse_starlette(place: Place) -> Iterator[Server]:
    """sse-starlette on uvicorn."""
    packages = ["sse-starlette", "starlette", "uvicorn"]
    with _python_peer(place, "sse-starlette", "peer_sse_starlette.py", packages) as server:
        yield server


@contextmanager
def nchan_(place: Place) -> Iterator[Server]:
    """Nchan in nginx."""
    try:
        version, module = nchan.installed()
    except nchan.NotInstalled as error:
        raise CannotRun(str(error)) from None
    port = free_port()
    with reachable_directory() as folder:
        log = folder / "error.log"
        nchan.configure(folder, module, port)
        with cores.on(place.server_core):
            process = subprocess.Popen(
                [nchan.NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", str(log)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        server = Nchan(
            "nchan", version, process, port, "/sub",
            {"kind": "nchan", "host": HOST, "port": port, "path": "/pub", "pipeline": 64},
            "one POST for each message (it takes no batches), pipelined",
            batch=1,
        )  # fmt: skip
        try:
            wait_for(lambda: server.get("/nothing")[0] == 404, process, log)
            yield server
        finally:
            end(process)


@contextmanager
def nchan_serial(place: Place) -> Iterator[Server]:
    """Nchan, published to by somebody who waits for each answer."""
    with nchan_(place) as server:
        server.name = NCHAN_SERIAL
        server.target["pipeline"] = 1
        server.how = "one POST for each message, each answered before the next"
        yield server


#: What they can do beyond sending what is published now.
ABILITIES = {
    SERVICE: {"history", "resume", "filters", "publishing"},
    "nchan": {"history", "resume", "publishing"},
}
#: Without the service, which is always there.
PEERS: dict[str, Callable[[Place], AbstractContextManager[Server]]] = {
    "aiohttp-sse": aiohttp_sse,
    "sse-starlette": sse_starlette,
    "nchan": nchan_,
    NCHAN_SERIAL: nchan_serial,
}


def ask(port: int, path: str, address: str | None = None, seconds: float = 10) -> tuple[int, bytes]:
    """GET something on a connection of its own; return the status and the body."""
    source = None if address is None else (address, 0)
    connection = http.client.HTTPConnection(HOST, port, timeout=seconds, source_address=source)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ready():
                return
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-1000:] if log.exists() else ""
            end(process)
            raise CannotRun(f"it does not come up: {said}")
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server; one that does not within seconds is killed."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
