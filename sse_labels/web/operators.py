"""`GET /streams` and `DELETE /streams/{id}`: list the open streams, and end one.

Promises: only a token with the right `admin` gets an answer. The answer is bounded, covers every
worker, and names the workers that did not answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from heapq import nsmallest
from typing import Any

from aiohttp import web

from sse_labels.errors import InvalidRequest, NoSuchStream, NotReady
from sse_labels.publishing.tokens import ADMIN, PublishTokens
from sse_labels.web.answers import json_response
from sse_labels.web.bearer import holder_of
from sse_labels.web.neighbours import Neighbours
from sse_labels.web.parameters import STREAMS_PARAMETERS, check_parameters, whole_number
from sse_labels.web.streams import OpenStream, Streams

#: The accepted values of `sort`. The first is the default.
SORTS = ("lag", "since")
DEFAULT_LIMIT, MAX_LIMIT = 100, 1000
OFF = "/streams is closed: this server was started without tokens (--publish-tokens-file)"


class OperatorHandlers:
    """Answers the requests of operators."""

    def __init__(
        self,
        streams: Streams,
        head: Callable[[], int],
        tokens: PublishTokens,
        neighbours: Neighbours,
    ) -> None:
        self._streams = streams
        self._head = head
        self._tokens = tokens
        self._neighbours = neighbours
        neighbours.answers |= {"list": self.streams_here, "cut": streams.cut}

    async def listed(self, request: web.Request) -> web.Response:
        """Answer with up to `limit` streams, by lag or age, and the number of all matches."""
        holder_of(request, self._tokens, ADMIN, OFF)
        check_parameters(request, STREAMS_PARAMETERS)
        sort = request.query.get("sort", SORTS[0])
        if sort not in SORTS:
            raise InvalidRequest(f"sort: got {sort[:60]!r}, expected one of {', '.join(SORTS)}")
        limit = whole_number(request, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        peer = request.query.get("peer")
        answers, silent = await self._neighbours.ask("list", peer, sort, limit)
        rows = [row for answer in answers for row in answer["streams"]]
        rows.sort(key=lambda row: row["since"] if sort == "since" else -row["lag"])
        total = sum(answer["total"] for answer in answers)
        shown = {"streams": rows[:limit], "total": total, "silent_workers": silent}
        return json_response(shown)

    async def cut(self, request: web.Request) -> web.Response:
        """End one stream with `StreamCut`, and answer 204. Raises NoSuchStream or NotReady."""
        by = holder_of(request, self._tokens, ADMIN, OFF)
        wanted = request.match_info["id"]
        answers, silent = await self._neighbours.ask("cut", wanted, by)
        if any(answers):
            return web.Response(status=204)
        if silent:
            named = ", ".join(map(str, silent))
            raise NotReady(
                f"no stream {wanted[:60]!r} was found, but worker {named} did not answer"
            )
        raise NoSuchStream(f"no stream {wanted[:60]!r} is open")

    def streams_here(self, peer: str | None, sort: str, limit: int) -> dict[str, Any]:
        """Return up to `limit` streams of this process, by lag or age, and their total."""
        found = [stream for stream in self._streams.open.values() if peer in (None, stream.client)]
        if sort == "since":
            first = nsmallest(limit, found, key=lambda stream: stream.opened)
        else:
            first = nsmallest(limit, found, key=lambda stream: stream.outbox.position)
        return {"streams": [self._row(stream) for stream in first], "total": len(found)}

    def _row(self, stream: OpenStream) -> dict[str, Any]:
        filter, outbox = stream.filter, stream.outbox
        seconds = time.monotonic() - stream.opened
        since = datetime.fromtimestamp(time.time() - seconds, UTC).isoformat(timespec="seconds")
        return {
            "id": stream.id,
            "peer": stream.client,
            "who": stream.subject,
            "worker": self._neighbours.number or 1,
            "since": since.replace("+00:00", "Z"),
            "seconds": round(seconds, 1),
            "state": "live" if outbox.caught_up else "catching up",
            "position": outbox.position,
            "lag": max(0, self._head() - outbox.position),
            "queued": outbox.queued,
            "filter": None if filter is None else {
                "sources": sorted(filter.sources),
                "uriPatterns": sorted([*filter.uris, *(f"{p}*" for p in filter.uri_prefixes)]),
                "values": sorted(filter.values),
            },
        }  # fmt: skip
