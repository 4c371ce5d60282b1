"""The HTTP side of a server: creates every handler once, and routes requests to the handlers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

from aiohttp import web

from sse_labels.config import Settings
from sse_labels.expiry.expiry import Expiry
from sse_labels.feed.feed import Feed
from sse_labels.metrics import Metrics
from sse_labels.protocol.xrpc import SUBSCRIBE_PATH
from sse_labels.publishing.publisher import Publisher
from sse_labels.publishing.rate import PublishRate
from sse_labels.publishing.tokens import PublishTokens
from sse_labels.web.addresses import PerAddress, TrustedProxies
from sse_labels.web.answers import add_security_headers, allow_origins, errors_as_json
from sse_labels.web.auth import StreamAuth
from sse_labels.web.delivery import retry_ms
from sse_labels.web.door.guard import Guard, most_connections
from sse_labels.web.health import HealthHandlers
from sse_labels.web.neighbours import Neighbours
from sse_labels.web.operators import OperatorHandlers
from sse_labels.web.page_files import page_files
from sse_labels.web.publish import PublishHandler
from sse_labels.web.query import QueryHandler
from sse_labels.web.stream import BUSY_RETRY_FACTOR, StreamHandler
from sse_labels.web.streams import Streams


class Site:
    """All handlers of one process."""

    def __init__(
        self,
        feed: Feed,
        expiry: Expiry,
        publisher: Publisher,
        tokens: PublishTokens,
        neighbours: Neighbours,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._feed = feed
        self._neighbours = neighbours
        self._metrics = metrics
        self._settings = settings
        self.proxies = TrustedProxies(settings.trusted_proxies)
        self.auth = StreamAuth(settings)
        self.streams = Streams(metrics, settings, self.proxies.trusts, lambda: self.auth.clock())
        self.stream_handler = StreamHandler(
            feed, expiry, self.streams, metrics, self.proxies, self.auth, settings
        )
        self.query = QueryHandler(feed.store, feed.sequencer, self.auth, self.proxies)
        self.health = HealthHandlers(feed.sequencer, feed.listener, neighbours)
        self.operators = OperatorHandlers(self.streams, feed.head, tokens, neighbours)
        self.publish = PublishHandler(
            publisher,
            tokens,
            PublishRate(settings.publish_rate_labels, settings.publish_burst_labels),
            max_labels=settings.publish_max_labels,
            body_seconds=settings.request_seconds,
        )

    def routes(self) -> web.Application:
        """Return the application with all routes."""
        app = web.Application(
            middlewares=[errors_as_json(self._metrics, self.proxies.client)],
            client_max_size=self._settings.body_max_bytes,
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
        allow_origins(app, self._settings.cors_origins)
        return app

    @contextlib.asynccontextmanager
    async def serving(
        self, sockets: Sequence[socket.socket], other_descriptors: int
    ) -> AsyncIterator[None]:
        """Answer requests inside the block, and drain after it.

        `other_descriptors` is the most file descriptors that the rest of the process needs.
        """
        runner = web.AppRunner(
            self.routes(),
            # aiohttp's default is off: 10,000 clients that disconnected left 10,000 handlers.
            handler_cancellation=True,
            shutdown_timeout=self._settings.drain_seconds,
        )
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - setup made it
        try:
            async with self._guard(other_descriptors).serving(runner.server, sockets):
                yield
        finally:
            self.health.stopping = True
            self.streams.stop()
            await runner.cleanup()
            await self.query.close()

    def _guard(self, other_descriptors: int) -> Guard:
        settings, sequencer = self._settings, self._feed.sequencer
        return Guard(
            self._metrics,
            PerAddress(settings.max_per_address, self.proxies.trusts),
            max_connections=most_connections(settings.max_connections, other_descriptors),
            request_seconds=settings.request_seconds,
            keepalive_seconds=settings.keepalive_seconds,
            busy_retry_ms=lambda: BUSY_RETRY_FACTOR * retry_ms(settings),
            head=lambda: sequencer.head if sequencer.started.is_set() else None,
            neighbours=self._neighbours,
            streams_full=self.streams.full,
        )
