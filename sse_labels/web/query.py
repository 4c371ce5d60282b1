"""`GET /xrpc/com.atproto.label.queryLabels`, as in its lexicon.

Promises: labels are ordered by seq, so a client that follows `cursor` gets every match once. Each
request reads a bounded number of rows. So an answer may contain fewer labels than `limit`, or
none, and still a cursor.
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
#: Queries that read at the same time. The pool has more connections for requests than this, so
#: publishing always finds one. Backfills use other connections, and never wait for queries.
QUERIES_AT_ONCE = 4


class QueryHandler:
    """Answers with the labels that match `uriPatterns`, and also `sources` and `values`."""

    def __init__(
        self, store: Store, sequencer: Sequencer, auth: StreamAuth, proxies: TrustedProxies
    ) -> None:
        self._store = store
        self._sequencer = sequencer
        self._auth = auth
        self._proxies = proxies
        self._reads = Reads(QUERIES_AT_ONCE)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer `{"cursor": "…", "labels": […]}`. The last answer has no cursor."""
        grant = self._auth.authorize(request)
        check_parameters(request, QUERY_PARAMETERS)
        if "uriPatterns" not in request.query:
            raise InvalidRequest("uriPatterns: expected at least one, e.g. uriPatterns=*")
        filter = within_grant(request_filter(request), grant)
        limit = whole_number(request, "limit", LIMIT_DEFAULT, 1, LIMIT_MAX)
        if not self._sequencer.started.is_set():
            # No seq is known to be settled yet: an empty answer would be wrong.
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
        # Rows below the floor stay in the table until a sweep deletes them.
        cursor = max(cursor, self._sequencer.floor - 1)
        # One row more than `limit` shows whether there is a next page.
        found = await self._store.query(filter, cursor, head, limit + 1, in_force=in_force)
        rows, end, now = found.rows[:limit], found.end, time.time()
        if len(found.rows) > limit or (len(rows) == limit and end < head):
            # After a full page the cursor is the seq of the page's last label.
            end = rows[-1].seq
        shown = [row for row in rows if not (in_force and is_expired(row.exp, now))]
        answer: dict[str, object] = {"labels": [label_json(*row.columns) for row in shown]}
        if end < head:
            answer["cursor"] = str(end)
        return answer

    async def close(self) -> None:
        """End the running queries. Called when no request is left."""
        await self._reads.close()
