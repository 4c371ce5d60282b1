"""The application: creates and connects all parts. One TaskGroup owns every task.

Promises: `serve` returns when `stop` is set and all parts are closed. When a task of the server
fails, `serve` ends with that error.
Does not belong here: command line and environment (`cli`, `config`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sse_labels.config import Settings, option_name
from sse_labels.database.epochs import claim_epoch
from sse_labels.database.migrations import migrate
from sse_labels.database.pool import Database
from sse_labels.database.schema import Schema
from sse_labels.errors import ConfigError, DatabaseRefused
from sse_labels.expiry.expiry import Expiry
from sse_labels.feed.feed import Feed
from sse_labels.logs import by_address
from sse_labels.metrics import Metrics
from sse_labels.process import tune_process
from sse_labels.publishing.keys import Keys
from sse_labels.publishing.label_table import LabelTable
from sse_labels.publishing.publisher import Publisher
from sse_labels.publishing.signature_watch import SignatureWatch
from sse_labels.publishing.tokens import PublishTokens
from sse_labels.web.door.listening import base_urls, listening_sockets
from sse_labels.web.neighbours import Neighbours
from sse_labels.web.site import Site

log = logging.getLogger(__name__)

#: Connections to PostgreSQL besides the backfills' reads: queries, publishing, two for expiries.
REQUEST_CONNECTIONS = 8
#: Connections with one purpose each: following, listening, retention.
OWN_CONNECTIONS = 3


class App:
    """All parts of one server process, connected but not started."""

    def __init__(
        self,
        settings: Settings,
        dsn: str,
        publish_token: str | None,
        *,
        neighbours: Neighbours | None = None,
        listeners: list[socket.socket] | None = None,
    ) -> None:
        """`dsn` names the database of the labels. Without any publish token, publishing is off.

        If the server has several processes, each gets its `neighbours`, and the `listeners` from
        which all processes accept.
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
        self.feed = Feed(self.database, self.schema, self.metrics, settings)
        self.expiry = Expiry(self.feed.store, self.feed.head, self.metrics, floor=self.feed.floor)
        self.feed.sequencer.watch(self.expiry.take)
        self.keys = Keys(settings)
        self.signature_watch: SignatureWatch | None = None
        # One process checks signatures for all processes: each process follows all labels.
        if self.keys.source_keys is not None and neighbours.number in (None, 1):
            self.signature_watch = SignatureWatch(self.keys.source_keys, self.metrics)
            self.feed.sequencer.watch(self.signature_watch.take)
        self.label_table = LabelTable(self.database)
        self.tokens = PublishTokens(publish_token, settings.publish_tokens_file)
        publisher = Publisher(self.label_table, self.schema, self.metrics, self.keys)
        self.site = Site(
            self.feed, self.expiry, publisher, self.tokens, neighbours, self.metrics, settings
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Serve inside the block, whose value is the port. At its end, close all streams.

        Raises ConfigError or SchemaError when the server cannot start, DatabaseUnavailable when the
        database does not answer. A task that fails later ends the block with its error.
        """
        # The sockets come first: if the port is taken, no migration must have run.
        sockets = self._listeners or listening_sockets(self.settings)
        try:
            port = sockets[0].getsockname()[1]
            await self.prepare()
            async with asyncio.TaskGroup() as tasks:
                work = {**self.feed.tasks(), "expiry": self.expiry.run()}
                if self.signature_watch is not None:
                    work["signatures"] = self.signature_watch.run()
                running = [tasks.create_task(run, name=name) for name, run in work.items()]
                try:
                    async with (
                        self.neighbours.answering(),
                        self.site.serving(sockets, other_descriptors(self.settings)),
                    ):
                        yield port
                finally:
                    for task in running:
                        task.cancel()
        finally:
            for listener in sockets:
                listener.close()
            await self.feed.pages.close()
            await self.expiry.close()
            self.database.close()

    async def prepare(self) -> None:
        """Migrate and check the database. Raises the same errors as `running`."""
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
                "publishing will be refused, because the role lacks a right: see the rights to "
                "publish in the README; or the schema is too old, because of --no-migrate"
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
                "until a label of --signing-did is published here, a mirror may store labels of "
                "this DID: migrate, and GRANT SELECT, INSERT ON label_own_source TO the role",
                extra={"did": did},
            )
        if self.keys.signing_key is not None:
            log.info(
                "published labels are signed",
                extra={"did": did, "key": self.keys.signing_key.did_key},
            )

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
    """Return the most connections to PostgreSQL that all processes of a server open."""
    reads = max(settings.backfill_max_reads, settings.workers)
    return settings.workers * (REQUEST_CONNECTIONS + OWN_CONNECTIONS) + reads


def other_descriptors(settings: Settings) -> int:
    """Return the number of descriptors that one process needs besides those of its clients."""
    # Each worker has one connection to each other worker, and one from each other worker.
    between_workers = 2 * (settings.workers - 1)
    return settings.backfill_max_reads + REQUEST_CONNECTIONS + OWN_CONNECTIONS + between_workers


async def serve(
    app: App,
    stop: asyncio.Event,
    ready: Callable[[int], Awaitable[Any]] | None = None,
) -> None:
    """Run `app` until `stop` is set. `ready` is awaited with the port once the app serves."""
    tune_process()
    async with app.running() as port:
        log.info("serving", extra={"address": base_urls(app.settings, port)})
        if ready is not None:
            await ready(port)
        await stop.wait()
        log.info("stopping")
