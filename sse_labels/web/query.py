"""`GET /xrpc/com.atproto.label.queryLabels`, as the lexicon describes it.

Promises: ordered by seq, so that following `cursor` reaches every match once.
Stands beside the corridor: it reads the same table, up to the same head.
Does not belong here: streams.
"""

from __future__ import annotations

from aiohttp import web

from sse_labels.errors import InvalidRequest, NotReady
from sse_labels.labels import label_json
from sse_labels.sequencer import Sequencer
from sse_labels.store import Store
from sse_labels.web.answers import json_response
from sse_labels.web.auth import StreamAuth, narrow
from sse_labels.web.parameters import SEQ_MAX, request_filter, whole_number

#: The lexicon's bounds of `limit`.
LIMIT_MAX = 250
LIMIT_DEFAULT = 50


class QueryHandler:
    """Answers with labels whose URI matches; `sources` and `values` narrow further."""

    def __init__(self, store: Store, sequencer: Sequencer, auth: StreamAuth) -> None:
        self._store = store
        self._sequencer = sequencer
        self._auth = auth

    async def handle(self, request: web.Request) -> web.Response:
        """Answer `{"cursor": "…", "labels": […]}`; no cursor when there is nothing more."""
        grant = self._auth.authorize(request)
        if "uriPatterns" not in request.query:
            raise InvalidRequest("uriPatterns: expected at least one, e.g. uriPatterns=*")
        narrowed = narrow(request_filter(request), grant)
        limit = whole_number(request, "limit", LIMIT_DEFAULT, 1, LIMIT_MAX)
        if not self._sequencer.started.is_set():
            # Nothing is known to be settled yet: an empty answer would be a wrong one.
            raise NotReady("the sequencer has no head yet")
        cursor = whole_number(request, "cursor", 0, 0, SEQ_MAX)
        # One more than asked for says whether there is a next page.
        rows = await self._store.query(narrowed, cursor, self._sequencer.head, limit + 1)
        answer: dict[str, object] = {"labels": [label_json(*row[1:]) for row in rows[:limit]]}
        if len(rows) > limit:
            answer["cursor"] = str(rows[limit - 1][0])
        return json_response(answer)
