"""`GET /xrpc/com.atproto.label.queryLabels`, as the lexicon describes it.

Promises: ordered by seq, so that following `cursor` reaches every match once.
Stands beside the corridor: it reads the same table, up to the same head.
Does not belong here: streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from aiohttp import web

from sse_labels.chunk import Row
from sse_labels.errors import InvalidRequest, NotReady
from sse_labels.filters import Filter
from sse_labels.labels import is_expired, label_json
from sse_labels.seq import SEQ_MAX
from sse_labels.sequencer import Sequencer
from sse_labels.store import Store
from sse_labels.web.answers import json_response
from sse_labels.web.auth import StreamAuth, narrow
from sse_labels.web.parameters import (
    QUERY_PARAMETERS,
    check_parameters,
    request_filter,
    wants_state,
    whole_number,
)

#: The lexicon's bounds of `limit`.
LIMIT_MAX = 250
LIMIT_DEFAULT = 50


#: Queries that read at the same time, fewer than the pool has connections for requests:
#: however many ask, publishing finds one.
QUERIES_AT_ONCE = 4


class QueryHandler:
    """Answers with labels whose URI matches; `sources` and `values` narrow further."""

    def __init__(self, store: Store, sequencer: Sequencer, auth: StreamAuth) -> None:
        self._store = store
        self._sequencer = sequencer
        self._auth = auth
        self._slots = asyncio.Semaphore(QUERIES_AT_ONCE)
        self._reading: set[asyncio.Task[Sequence[Row]]] = set()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer `{"cursor": "…", "labels": […]}`; no cursor when there is nothing more."""
        grant = self._auth.authorize(request)
        check_parameters(request, QUERY_PARAMETERS)
        if "uriPatterns" not in request.query:
            raise InvalidRequest("uriPatterns: expected at least one, e.g. uriPatterns=*")
        narrowed = narrow(request_filter(request), grant)
        limit = whole_number(request, "limit", LIMIT_DEFAULT, 1, LIMIT_MAX)
        if not self._sequencer.started.is_set():
            # Nothing is known to be settled yet: an empty answer would be a wrong one.
            raise NotReady("the sequencer has no head yet")
        cursor = whole_number(request, "cursor", 0, 0, SEQ_MAX)
        in_force = wants_state(request)
        # One more than asked for says whether there is a next page.
        rows = await self._read(narrowed, cursor, limit + 1, in_force)
        now = time.time()
        shown = [row for row in rows[:limit] if not (in_force and is_expired(row[7], now))]
        answer: dict[str, object] = {"labels": [label_json(*row[1:]) for row in shown]}
        if len(rows) > limit:
            answer["cursor"] = str(rows[limit - 1][0])
        return json_response(answer)

    async def _read(
        self, narrowed: Filter | None, cursor: int, limit: int, in_force: bool
    ) -> Sequence[Row]:
        """Return the rows; the query goes on, and keeps its slot, when the client leaves.

        A cancelled one would close its connection, which PostgreSQL notices only when it is done:
        clients that hang up could have it work on more than the pool allows.
        """
        await self._slots.acquire()
        head = self._sequencer.head
        query = self._store.query(narrowed, cursor, head, limit, in_force=in_force)
        task = asyncio.create_task(query, name="query")
        self._reading.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Sequence[Row]]) -> None:
        self._slots.release()
        self._reading.discard(task)
        # The client may be gone when it fails; then nobody else would look at the error.
        if not task.cancelled():
            task.exception()

    async def close(self) -> None:
        """End the queries that are under way; called when no request is left."""
        reading = tuple(self._reading)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
