"""`/health/live`, `/health/ready` and `/metrics`, for the operator's monitoring.

Promises: live answers as long as the event loop runs. Ready is 200 only while the sequencer
follows the table and notifications arrive.
"""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST

from sse_labels.errors import NotReady
from sse_labels.feed.listener import Listener
from sse_labels.feed.sequencer import Sequencer
from sse_labels.metrics import render
from sse_labels.web.answers import error_response, json_response
from sse_labels.web.neighbours import Neighbours


class HealthHandlers:
    """Answers the three paths."""

    def __init__(self, sequencer: Sequencer, listener: Listener, neighbours: Neighbours) -> None:
        """`neighbours` answer the question `numbers`."""
        self._sequencer = sequencer
        self._listener = listener
        self._neighbours = neighbours
        self._one_scrape = asyncio.Lock()
        self._text = b""
        #: When the workers were asked for the numbers in `_text`.
        self._asked_at = 0.0
        #: True while the server drains: a load balancer should send no clients here.
        self.stopping = False

    async def live(self, request: web.Request) -> web.Response:
        """Answer 200: the event loop runs."""
        return json_response({"status": "live"})

    async def ready(self, request: web.Request) -> web.Response:
        """Answer 200 with the head, or 503 with the reasons."""
        reasons = []
        if self.stopping:
            reasons.append("the server is stopping")
        if not self._sequencer.started.is_set():
            reasons.append("the sequencer has no head yet")
        elif not self._sequencer.following:
            reasons.append("the sequencer is not following: the database is away")
        elif not self._listener.listening.is_set():
            reasons.append("notifications do not arrive: labels come only by polling")
        if reasons:
            return error_response(NotReady("; ".join(reasons)))
        return json_response({"status": "ready", "head": self._sequencer.head})

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer in Prometheus' text format."""
        clock = asyncio.get_running_loop().time
        came_at = clock()
        # Everybody may scrape. A flood of scrapes opens at most one socket to each worker. Waiting
        # scrapes share the next answer
        # (test_a_flood_of_scrapes_asks_each_worker_once_at_a_time).
        async with self._one_scrape:
            if self._asked_at <= came_at:
                asked_at = clock()
                workers, _ = await self._neighbours.ask("numbers")
                # Only now: the client may leave while the workers are asked.
                self._text, self._asked_at = render(workers), asked_at
            text = self._text
        return web.Response(body=text, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})
