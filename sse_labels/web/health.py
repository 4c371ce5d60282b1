"""`/health/live`, `/health/ready` and `/metrics`: what an operator's machinery asks.

Promises: live answers as long as the event loop turns; ready is 200 only while
the sequencer follows the table and notifications arrive.
Stands beside the corridor.
Does not belong here: counting.
"""

from __future__ import annotations

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST

from sse_labels.listener import Listener
from sse_labels.metrics import Metrics
from sse_labels.sequencer import Sequencer
from sse_labels.web.answers import json_response


class HealthHandlers:
    """Answers the three operator's questions."""

    def __init__(self, sequencer: Sequencer, listener: Listener, metrics: Metrics) -> None:
        self._sequencer = sequencer
        self._listener = listener
        self._metrics = metrics
        #: Set by the app when it drains: a load balancer should send nobody here.
        self.stopping = False

    async def live(self, request: web.Request) -> web.Response:
        """Answer 200: this process is not stuck."""
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
            reasons.append("notifications do not arrive: labels come by polling alone")
        if reasons:
            message = "; ".join(reasons)
            answer = json_response({"error": "NotReady", "message": message}, status=503)
            answer.headers[hdrs.RETRY_AFTER] = "1"
            return answer
        return json_response({"status": "ready", "head": self._sequencer.head})

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer Prometheus' text format."""
        return web.Response(
            body=self._metrics.render(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST}
        )
