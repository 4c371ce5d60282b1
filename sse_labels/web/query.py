"""`GET /xrpc/com.atproto.label.queryLabels`, as the lexicon describes it.

Promises: ordered by seq, so that following `cursor` reaches every match once. A request looks at so
many rows and no more: an answer may hold fewer labels than were asked for, or none, and a cursor.
Does not belong here: streams.
"""

from __future__ import annotations

import time
from functools import partial

from aiohttp import web

from sse_labels.errors import InvalidRequest, NotReady
from sse_labels.feed.reads import Reads
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.store import Store
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.formats import is_expired
from sse_labels.protocol.label import label_json
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.web.addresses import TrustedProxies, reader_of
from sse_labels.web.answers import json_response
from sse_labels.web.auth import StreamAuth, within_grant
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


#: Queries that read at the same time, fewer than the pool has connections for requests: however
#: many ask, publishing finds one. Backfills have others, and never wait for queries.
QUERIES_AT_ONCE = 4


class QueryHandler:
    """Answers with labels whose URI matches; `sources` and `values` narrow further."""

    def __init__(
        self, store: Store, sequencer: Sequencer, auth: StreamAuth, proxies: TrustedProxies
    ) -> None:
        self._store = store
        self._sequencer = sequencer
        self._auth = auth
        self._proxies = proxies
        self._reads = Reads(QUERIES_AT_ONCE)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer `{"cursor": "…", "labels": […]}`; no cursor when there is nothing more."""
        grant = self._auth.authorize(request)
        check_parameters(request, QUERY_PARAMETERS)
        if "uriPatterns" not in request.query:
            raise InvalidRequest("uriPatterns: expected at least one, e.g. uriPatterns=*")
        filter = within_grant(request_filter(request), grant)
        limit = whole_number(request, "limit", LIMIT_DEFAULT, 1, LIMIT_MAX)
        if not self._sequencer.started.is_set():
            # Nothing is known to be settled yet: an empty answer would be a wrong one.
            raise NotReady("the sequencer has no head yet")
        cursor = whole_number(request, "cursor", 0, 0, SEQ_MAX)
        in_force = wants_state(request)
        asked = (filter, cursor, limit, in_force)
        reader = reader_of(self._proxies.client(request), grant.subject)
        return json_response(await self._reads.read(reader, asked, partial(self._answer, *asked)))

    async def _answer(
        self, filter: Filter | None, cursor: int, limit: int, in_force: bool
    ) -> dict[str, object]:
        head = self._sequencer.head
        # Rows below the floor stay for as long as a sweep takes, or until the next one.
        cursor = max(cursor, self._sequencer.floor - 1)
        # One more than asked for says whether there is a next page.
        found = await self._store.query(filter, cursor, head, limit + 1, in_force=in_force)
        rows, end, now = found.rows[:limit], found.end, time.time()
        if len(found.rows) > limit or (len(rows) == limit and end < head):
            # Behind as many labels as were asked for, the cursor is the last one's seq.
            end = rows[-1].seq
        shown = [row for row in rows if not (in_force and is_expired(row.exp, now))]
        answer: dict[str, object] = {"labels": [label_json(*row.columns) for row in shown]}
        if end < head:
            answer["cursor"] = str(end)
        return answer

    async def close(self) -> None:
        """End the queries that are under way; called when no request is left."""
        await self._reads.close()
