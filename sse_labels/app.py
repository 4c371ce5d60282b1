"""The application: every part made once, every task owned by one TaskGroup.

Promises: `serve` returns when it was told to stop and everything is closed;
when a task of its own fails, it ends with that error instead of pretending.
Stands above the whole corridor, and wires it.
Does not belong here: what the parts do; command line and environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from sse_labels.config import Settings, option_name
from sse_labels.database import Database
from sse_labels.errors import ConfigError, DatabaseRefused
from sse_labels.expiry import Expiry
from sse_labels.label_table import LabelTable
from sse_labels.listener import Listener
from sse_labels.lives import claim_epoch
from sse_labels.logs import by_address
from sse_labels.metrics import Metrics
from sse_labels.migrations import migrate
from sse_labels.pages import Pages
from sse_labels.publish_tokens import PublishTokens
from sse_labels.publisher import Publisher
from sse_labels.retention import Retention
from sse_labels.schema import Schema
from sse_labels.sequencer import Sequencer
from sse_labels.signature_watch import SignatureWatch
from sse_labels.signatures import SigningKey, SourceKeys
from sse_labels.store import Store
from sse_labels.web.addresses import PerAddress, TrustedProxies
from sse_labels.web.answers import add_security_headers, allow_origins, errors_as_json
from sse_labels.web.auth import StreamAuth
from sse_labels.web.connection import end_dead_peers
from sse_labels.web.delivery import retry_ms
from sse_labels.web.guard import Guard, most_connections
from sse_labels.web.health import HealthHandlers
from sse_labels.web.neighbours import Neighbours
from sse_labels.web.operators import OperatorHandlers
from sse_labels.web.page_files import page_files
from sse_labels.web.publish import PublishHandler
from sse_labels.web.query import QueryHandler
from sse_labels.web.rate import PublishRate
from sse_labels.web.stream import BUSY_RETRY_FACTOR, StreamHandler
from sse_labels.web.streams import Streams
from sse_labels.xrpc import SUBSCRIBE_PATH

log = logging.getLogger(__name__)

#: Connections that may wait to be accepted: with 128, 10,000 connects took 16 s, with 4096 under 3.
BACKLOG = 4096
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
#: Connections to PostgreSQL beside the backfills' reads: queries, publishing, and two for expiries.
REQUEST_CONNECTIONS = 8
#: And those that are kept for one purpose: following, listening, retention.
OWN_CONNECTIONS = 3
#: The collector was a third of the cost of accepting connections with CPython's defaults.
GC_THRESHOLD = (100_000, 50, 100)


class App:
    """All parts of one server process, wired but not started."""

    def __init__(
        self,
        settings: Settings,
        dsn: str,
        publish_token: str | None,
        *,
        neighbours: Neighbours | None = None,
        listeners: list[socket.socket] | None = None,
    ) -> None:
        """`dsn` is where the labels are; without `publish_token` publishing is off.

        One of several processes gets its `neighbours`, and the sockets that they all accept from.
        """
        self.settings = settings
        self.neighbours = neighbours = neighbours or Neighbours()
        self._listeners = listeners
        self.metrics = Metrics(neighbours.number)
        neighbours.answers["numbers"] = self.metrics.numbers
        by_address.count = self.metrics.count
        self.database = Database(
            dsn,
            connect_timeout_seconds=settings.connect_timeout_seconds,
            query_timeout_seconds=settings.query_timeout_seconds,
            max_connections=settings.backfill_max_reads + REQUEST_CONNECTIONS,
        )
        self.schema = Schema(self.database, settings.source)
        self.store = Store(
            self.database, self.schema, withhold_unsigned=settings.unsigned == "withhold"
        )
        if settings.signing_did is not None and settings.signing_key_file is None:
            raise ConfigError(
                option_name("signing_did"), settings.signing_did, "--signing-key-file as well"
            )
        self.signing_key = (
            None
            if settings.signing_key_file is None
            else SigningKey.load(settings.signing_key_file)
        )
        self.source_keys = (
            None if settings.source_keys_file is None else SourceKeys(settings.source_keys_file)
        )
        self._check_signing_key()
        #: Of several processes one is enough: each follows all labels.
        first = neighbours.number in (None, 1)
        self.signature_watch = (
            SignatureWatch(self.source_keys, self.metrics) if self.source_keys and first else None
        )
        self.expiry = Expiry(
            self.store,
            lambda: self.sequencer.head,
            self.metrics,
            floor=lambda: self.sequencer.floor,
        )
        watchers = [self.expiry.take]
        if self.signature_watch is not None:
            watchers.append(self.signature_watch.take)
        self.sequencer = Sequencer(
            self.store,
            self.metrics,
            page_max_events=settings.page_max_events,
            ring_max_bytes=settings.ring_max_bytes,
            poll_seconds=settings.poll_seconds,
            gather_seconds=settings.gather_seconds,
            watchers=watchers,
        )
        self.listener = Listener(
            self.database, self.metrics, self.sequencer.wake, self.sequencer.floor_raised
        )
        self.pages = Pages(
            self.store,
            lambda: self.sequencer.head,
            self.metrics,
            page_max_events=settings.page_max_events,
            max_reads=settings.backfill_max_reads,
            cache_max_bytes=settings.page_cache_max_bytes,
        )
        self.proxies = TrustedProxies(settings.trusted_proxies)
        self.auth = StreamAuth(settings)
        self.streams = Streams(
            self.metrics, settings, self.proxies.trusts, lambda: self.auth.clock()
        )
        self.stream_handler = StreamHandler(
            self.sequencer, self.pages, self.expiry, self.store, self.streams, self.metrics,
            self.proxies, self.auth, settings,
        )  # fmt: skip
        self.retention = Retention(
            self.database,
            self.schema,
            lambda: self.sequencer.head,
            self.sequencer.look_at_state,
            self.metrics,
            max_age_seconds=settings.retention_max_age_seconds,
            max_labels=settings.retention_max_labels,
            sweep_seconds=settings.retention_sweep_seconds,
            batch_labels=settings.retention_batch_labels,
        )
        self.health = HealthHandlers(self.sequencer, self.listener, neighbours)
        self.tokens = tokens = PublishTokens(publish_token, settings.publish_tokens_file)
        self.operators = OperatorHandlers(
            self.streams, lambda: self.sequencer.head, tokens, neighbours
        )
        self.label_table = LabelTable(self.database)
        self.publish = PublishHandler(
            Publisher(
                self.label_table,
                self.schema,
                self.metrics,
                signing_key=self.signing_key,
                signing_did=settings.signing_did,
                source_keys=self.source_keys,
            ),
            tokens,
            PublishRate(settings.publish_rate_labels, settings.publish_burst_labels),
            max_labels=settings.publish_max_labels,
            body_seconds=settings.request_seconds,
        )
        self.query = QueryHandler(self.store, self.sequencer, self.auth, self.proxies)

    def routes(self) -> web.Application:
        """Return the HTTP side."""
        app = web.Application(
            middlewares=[errors_as_json(self.metrics, self.proxies.client)],
            client_max_size=self.settings.body_max_bytes,
        )
        for path, file in page_files():
            app.router.add_get(path, file.handle)
        app.router.add_get("/stream", self.stream_handler.handle)
        app.router.add_get("/streams", self.operators.listed)
        app.router.add_delete("/streams/{id}", self.operators.cut)
        app.router.add_post("/labels", self.publish.handle)
        app.router.add_get("/xrpc/com.atproto.label.queryLabels", self.query.handle)
        app.router.add_get(SUBSCRIBE_PATH, self.stream_handler.subscribe)
        app.router.add_get("/health/live", self.health.live)
        app.router.add_get("/health/ready", self.health.ready)
        app.router.add_get("/metrics", self.health.metrics)
        app.on_response_prepare.append(add_security_headers)
        allow_origins(app, self.settings.cors_origins)
        return app

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Serve inside the block, whose value is the port; drain when it is left.

        Raises ConfigError or SchemaError when it cannot start, DatabaseUnavailable when the
        database does not answer. A task that fails later ends the block with its error.
        """
        # First of all: a port that is taken should not cost a migration.
        sockets = self._listeners or listening_sockets(self.settings)
        try:
            port = sockets[0].getsockname()[1]
            await self.prepare()
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self.sequencer.run(), name="sequencer"),
                    tasks.create_task(self.listener.run(), name="listener"),
                    tasks.create_task(self.retention.run(), name="retention"),
                    tasks.create_task(self.expiry.run(), name="expiry"),
                ]
                if self.signature_watch is not None:
                    watching = tasks.create_task(self.signature_watch.run(), name="signatures")
                    running.append(watching)
                try:
                    async with self.neighbours.answering(), self._http(sockets):
                        yield port
                finally:
                    for task in running:
                        task.cancel()
        finally:
            for listener in sockets:
                listener.close()
            await self.pages.close()
            await self.expiry.close()
            await self.query.close()
            self.database.close()

    async def prepare(self) -> None:
        """Bring the database to where it can be served from, or raise as `running` does."""
        await self.schema.find_source()
        if self.settings.migrate and not self.schema.attached:
            try:
                await migrate(self.database)
            except DatabaseRefused as error:
                raise DatabaseRefused(
                    f"{error}; run `sse-labels migrate` as the owner of the schema, and serve with "
                    "--no-migrate"
                ) from error
        await self.schema.check()
        if not (self.schema.attached or self.schema.may_publish or self.tokens.empty):
            log.warning(
                "publishing will be refused, the role may not do all that it takes: see the rights "
                "to publish in the README; --no-migrate may also have left the schema too old"
            )
        await claim_epoch(self.database, self.schema)
        self._check_retention()
        did = self.settings.signing_did
        if (
            did is not None
            and not self.schema.attached
            and not await self.label_table.note_own_source(did)
        ):
            log.warning(
                "a mirror is not kept from labels of --signing-did until one is published: "
                "migrate, and GRANT SELECT, INSERT ON label_own_source TO the role",
                extra={"did": did},
            )
        if self.signing_key is not None:
            log.info(
                "published labels are signed",
                extra={"did": self.settings.signing_did, "key": self.signing_key.did_key},
            )

    @contextlib.asynccontextmanager
    async def _http(self, sockets: list[socket.socket]) -> AsyncIterator[None]:
        runner = web.AppRunner(
            self.routes(),
            # Off by default in aiohttp: 10,000 clients that hung up left 10,000 handlers.
            handler_cancellation=True,
            shutdown_timeout=self.settings.drain_seconds,
        )
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - setup made it
        try:
            async with self._guard().serving(runner.server, sockets):
                yield
        finally:
            self.health.stopping = True
            self.streams.stop()
            await runner.cleanup()

    def _guard(self) -> Guard:
        settings = self.settings
        # Each worker asks each other one, and is asked.
        others = settings.backfill_max_reads + REQUEST_CONNECTIONS + OWN_CONNECTIONS
        others += 2 * (settings.workers - 1)
        return Guard(
            self.metrics,
            PerAddress(settings.max_per_address, self.proxies.trusts),
            max_connections=most_connections(settings.max_connections, others),
            request_seconds=settings.request_seconds,
            keepalive_seconds=settings.keepalive_seconds,
            busy_retry_ms=lambda: BUSY_RETRY_FACTOR * retry_ms(settings),
            head=lambda: self.sequencer.head if self.sequencer.started.is_set() else None,
            neighbours=self.neighbours,
            streams_full=self.streams.full,
        )

    def _check_signing_key(self) -> None:
        """Refuse to sign what this server itself would call wrongly signed."""
        did, keys, key = self.settings.signing_did, self.source_keys, self.signing_key
        if did is None or keys is None or key is None:
            return
        if keys.deny(did, key):
            raise ConfigError(
                option_name("signing_key_file"), str(self.settings.signing_key_file),
                f"a key of {did} in --source-keys-file; the public one of this is {key.did_key}",
            )  # fmt: skip

    def _check_retention(self) -> None:
        for name in ("retention_max_age_seconds", "retention_max_labels"):
            value = getattr(self.settings, name)
            if value is not None and not self.schema.may_delete:
                if self.schema.attached:
                    raise ConfigError(
                        option_name(name), value, "none: Ozone's table is read, never written"
                    )
                raise ConfigError(
                    option_name(name), value,
                    "a table made by `sse-labels migrate`, and a role that may DELETE from label "
                    "and UPDATE label_stream",
                )  # fmt: skip


def database_connections(settings: Settings) -> int:
    """Return how many connections to PostgreSQL all processes of a server open at most."""
    reads = max(settings.backfill_max_reads, settings.workers)
    return settings.workers * (REQUEST_CONNECTIONS + OWN_CONNECTIONS) + reads


def listening_sockets(settings: Settings) -> list[socket.socket]:
    """Return bound sockets for every address of the hosts; raise ConfigError when one is taken."""
    places = {host: _addresses(host, settings.port) for host in settings.host}
    # `::` is both families, unless IPv4 is named beside it.
    both = "0.0.0.0" not in settings.host and socket.has_dualstack_ipv6()  # noqa: S104
    sockets: dict[str, socket.socket] = {}
    port = settings.port
    try:
        for host, addresses in places.items():
            for family, address in addresses:
                if address[0] in sockets:
                    continue
                try:
                    listener = socket.create_server(
                        (address[0], port, *address[2:]), family=family, backlog=BACKLOG,
                        dualstack_ipv6=both and address[0] == "::",
                    )  # fmt: skip
                except OSError as error:
                    if error.errno in _NO_SUCH_ADDRESS:
                        # A name may stand for both families where the machine has one.
                        continue
                    # asyncio's and socket's own text repeats the address.
                    reason = os.strerror(error.errno or 0)
                    raise ConfigError(
                        option_name("port"), port, f"a free port on {address[0]} ({reason})"
                    ) from error
                sockets[address[0]] = listener
                port = listener.getsockname()[1]
                _tune(listener, settings)
            if not any(address[0] in sockets for _, address in addresses):
                raise ConfigError(option_name("host"), host, "an address of this machine")
    except BaseException:
        for listener in sockets.values():
            listener.close()
        raise
    return list(sockets.values())


def _tune(listener: socket.socket, settings: Settings) -> None:
    """Set what every connection inherits."""
    # Readers that stall hold this much kernel memory, not 4 MiB.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_bytes)
    end_dead_peers(
        listener,
        quiet_seconds=settings.heartbeat_seconds,
        # A reader that is alive and slow is cut by its delivery within this.
        unanswered_seconds=settings.send_timeout_seconds + settings.slow_grace_seconds,
    )


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Return what a host stands for; raise ConfigError when it is nothing."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name that can be looked up"
        raise ConfigError(
            option_name("host"), host, f"an address of this machine ({reason})"
        ) from error
    return [(family, address) for family, _, _, _, address in found]


async def serve(
    app: App,
    stop: asyncio.Event,
    ready: Callable[[int], Awaitable[Any]] | None = None,
) -> None:
    """Run `app` until `stop` is set; `ready` is awaited with the port once it serves."""
    tune_process()
    async with app.running() as port:
        log.info("serving", extra={"address": base_urls(app.settings, port)})
        if ready is not None:
            await ready(port)
        await stop.wait()
        log.info("stopping")


def base_urls(settings: Settings, port: int) -> str:
    """Return the addresses of a server as URLs, separated by commas."""
    return ",".join(base_url(host, port) for host in settings.host)


def base_url(host: str, port: int) -> str:
    """Return the address of a server as a URL; an IPv6 address is bracketed (RFC 3986, 3.2.2)."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def tune_process() -> None:
    """Raise the limit of open files to what is allowed, and calm the garbage collector."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.set_threshold(*GC_THRESHOLD)
    gc.collect()
    gc.freeze()
