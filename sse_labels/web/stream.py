"""`GET /stream` and `subscribeLabels`: who may read, from where, and whether there is a place.

Promises: whatever is wrong with a request is answered before the status line; what a
stream holds (a place, its address's share) it gives back when it ends, however it does.
Stands at the end of the corridor, before `event_stream` and `label_socket`.
Does not belong here: what happens once a stream is open.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from heapq import nsmallest
from typing import Any

from aiohttp import hdrs, web

from sse_labels.config import Settings
from sse_labels.errors import (
    DatabaseUnavailable,
    EpochChanged,
    Forbidden,
    FutureCursor,
    NotReady,
    RequestError,
    ServerStopping,
    StreamCut,
    TokenExpired,
    TooManyConnections,
    TooManyFromAddress,
)
from sse_labels.expiry import Expiry
from sse_labels.expiry_reader import ExpiryReader
from sse_labels.filters import Filter
from sse_labels.metrics import Metrics
from sse_labels.outbox import Outbox
from sse_labels.pages import Pages
from sse_labels.sequencer import Sequencer
from sse_labels.sse import encode_error, encode_opening
from sse_labels.store import Snapshot, Store
from sse_labels.web.addresses import PerAddress, TrustedProxies, caused_by, reader_of
from sse_labels.web.auth import Grant, StreamAuth, narrow
from sse_labels.web.delivery import retry_ms
from sse_labels.web.event_stream import HEADERS, EventStream
from sse_labels.web.label_socket import (
    LabelSocket,
    Messages,
    page_elsewhere,
    refuse,
    wants_socket,
)
from sse_labels.web.parameters import (
    STREAM_PARAMETERS,
    check_parameters,
    expired_since,
    position_of,
    request_filter,
    stream_cursor,
    wants_state,
)

log = logging.getLogger(__name__)

#: How long a stream that opens before the sequencer's start waits for it, in seconds.
START_WAIT_SECONDS = 5.0
#: What a client that came to a full server waits, as a multiple of the usual retry.
BUSY_RETRY_FACTOR = 10
#: New consumers begin with the same state for so many seconds, while no more events than that
#: have come since: its pages are read once for all of them.
SNAPSHOT_SHARED_SECONDS = 30.0
SNAPSHOT_SHARED_EVENTS = 10_000
#: What share of `ring_max_bytes` events may hold that were encoded for WebSockets.
MESSAGES_SHARE = 8
#: What operators may have streams sorted by; the first unless they say.
SORTS = ("lag", "since")


@dataclass(slots=True, eq=False)
class Visit:
    """An open stream, and what it holds."""

    #: 64 random bits: unique over workers and restarts, and nobody guesses it.
    id: str
    outbox: Outbox
    client: str
    narrowed: Filter | None
    #: Whose token opened it (`sub`), if it says; chosen by others.
    subject: str | None
    #: What its address holds by it.
    share: str | None
    opened: float
    expiry: asyncio.TimerHandle | None = None


class StreamHandler:
    """Answers `GET /stream`, and knows all streams that are open."""

    def __init__(
        self,
        sequencer: Sequencer,
        pages: Pages,
        expiry: Expiry,
        store: Store,
        metrics: Metrics,
        proxies: TrustedProxies,
        auth: StreamAuth,
        settings: Settings,
        worker: int | None = None,
    ) -> None:
        """`worker` says which of several processes this is, from 1."""
        self._sequencer = sequencer
        self._pages = pages
        self._expiry = expiry
        self._store = store
        self._metrics = metrics
        self._settings = settings
        self._proxies = proxies
        self._auth = auth
        self._per_address = PerAddress(settings.max_per_address, proxies.trusts)
        self._messages = Messages(settings.ring_max_bytes // MESSAGES_SHARE)
        self._open: dict[str, Visit] = {}
        #: The state that new consumers begin with, when it was new, since 1970, and the floor then.
        self._shared: tuple[Snapshot, float, int] | None = None
        self._stopping = False
        self._worker = worker or 1
        metrics.gauges["streams"] = lambda: len(self._open)
        metrics.gauges["streams_limit"] = lambda: settings.max_streams
        metrics.gauges["streams_backfilling"] = lambda: sum(
            not visit.outbox.caught_up for visit in self._open.values()
        )

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Return the WebSocket that was asked for, or the event stream without an upgrade."""
        if not wants_socket(request):
            return await self.handle(request)
        # A browser lets every page open WebSockets, and sends the cookies along.
        elsewhere = page_elsewhere(request)
        if elsewhere and not {"*", elsewhere} & set(self._settings.cors_origins):
            raise Forbidden("pages of this origin may not read here")
        grant = self._auth.authorize(request, by_cookie=not elsewhere)
        return await self._handle(request, grant, socket=True)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Return the event stream that was asked for; raise what is wrong with the request."""
        return await self._handle(request, self._auth.authorize(request), socket=False)

    async def _handle(
        self, request: web.Request, grant: Grant, *, socket: bool
    ) -> web.StreamResponse:
        # A grant before all else: 401 and 403 are final for a browser too.
        check_parameters(request, STREAM_PARAMETERS)
        cursor = stream_cursor(request)
        state = wants_state(request)
        since = expired_since(request, self._expiry.clock())
        narrowed = narrow(request_filter(request), grant)
        client = self._proxies.client(request)
        try:
            start = await self._start(
                0 if state and cursor is None else cursor, request.query.get("epoch")
            )
            if request.method == hdrs.METH_HEAD:
                return await self._head(request)
            snapshot = None
            if state:
                snapshot, since = self._snapshot(start, since)
            visit = self._let_in(client, narrowed, grant.subject, snapshot, since)
        except (TooManyConnections, TooManyFromAddress, NotReady, EpochChanged) as error:
            if socket:
                return await self._refuse(request, error, final=isinstance(error, EpochChanged))
            if "text/event-stream" in request.headers.get(hdrs.ACCEPT, ""):
                # A browser takes any other status than 200 for final, and never comes back.
                # Another life's head is nothing to who names this one.
                known = self._sequencer.started.is_set() and not isinstance(error, EpochChanged)
                head = self._sequencer.head if known else None
                return await self._busy(request, error, position_of(cursor, head, state=state))
            raise
        except FutureCursor as error:
            if socket:
                return await self._refuse(request, error, final=True)
            raise
        log.info(
            "stream opened",
            extra=caused_by(client, cursor=cursor, filter=narrowed, id=visit.id, opens=visit.id),
        )
        try:
            if grant.expires_at is not None:
                self._end_at(visit, grant.expires_at)
            open_stream = self._label_socket if socket else self._event_stream
            stream = open_stream(request, visit, start)
            await stream.prepare(request)
        except BaseException:
            self._ended(visit, "ClientGone")
            raise
        # Nothing awaits from here until aiohttp asks it for its body; then it ends itself.
        return stream

    def _snapshot(self, start: int, since: float | None) -> tuple[Snapshot, float | None]:
        """Return the state to begin with, and from when on to tell of what expires.

        While labels are published every consumer would have a state of its own, for which the
        whole table is read: those who come together share one, and what came since follows it.
        """
        head = self._sequencer.head
        if start > 0:
            return Snapshot(head, resumed=True), since
        now = self._expiry.clock()
        if self._shared is None or not self._may_share(*self._shared, head, now):
            self._shared = Snapshot(head, resumed=False), now, self._sequencer.floor
        snapshot, begun, _ = self._shared
        return snapshot, None if since is None else min(since, begun)

    def _may_share(
        self, snapshot: Snapshot, begun: float, floor: int, head: int, now: float
    ) -> bool:
        """Say whether a state that was the newest then is new enough."""
        # Either may be less than nothing: another database, a clock that was set.
        return (
            floor == self._sequencer.floor
            and 0 <= head - snapshot.until <= SNAPSHOT_SHARED_EVENTS
            and 0 <= now - begun <= SNAPSHOT_SHARED_SECONDS
        )

    def _let_in(
        self,
        client: str,
        narrowed: Filter | None,
        subject: str | None,
        snapshot: Snapshot | None,
        since: float | None,
    ) -> Visit:
        """Take a place for one more stream; raise what keeps it from opening."""
        self._admit()
        share = self._per_address.take(client)
        reader = reader_of(client, subject)
        outbox = Outbox(
            self._sequencer,
            self._pages,
            self._metrics,
            client=reader,
            narrowed=narrowed,
            page_max_events=self._settings.page_max_events,
            max_events=self._settings.outbox_max_events,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            snapshot=snapshot,
            expiries=(
                None if since is None else ExpiryReader(self._expiry, reader, narrowed, since)
            ),
        )
        visit = Visit(
            secrets.token_hex(8), outbox, client, narrowed, subject, share, time.monotonic()
        )
        self._open[visit.id] = visit
        return visit

    def _ended(self, visit: Visit, how: str) -> None:
        """Take back what the stream had."""
        if visit.expiry is not None:
            visit.expiry.cancel()
        del self._open[visit.id]
        self._per_address.give_back(visit.share)
        self._metrics.streams_ended[how] += 1
        log.info(
            "stream closed",
            extra={
                "peer": visit.client,
                "how": how,
                "seconds": time.monotonic() - visit.opened,
                "position": visit.outbox.position,
                "id": visit.id,
                "closes": visit.id,
            },
        )

    def _end_at(self, visit: Visit, expires_at: float) -> None:
        """End the stream when its token does, by the clock that the token was made by."""
        left = expires_at - self._auth.clock()
        if left <= 0:
            message = "the token has expired; reconnect with a new one and the last id"
            visit.outbox.close(TokenExpired(message))
            return
        # Timers do not see that clock being set: look again at each heartbeat, whether events
        # come or not (test_token_that_the_clock_passes_by_ends_its_stream).
        visit.expiry = asyncio.get_running_loop().call_later(
            min(left, self._settings.heartbeat_seconds), self._end_at, visit, expires_at
        )

    def listed(self, peer: str | None, sort: str, limit: int) -> dict[str, Any]:
        """Return the `limit` streams that lag most, or are oldest, and how many there are."""
        found = [v for v in self._open.values() if peer is None or v.client == peer]
        if sort == "since":
            first = nsmallest(limit, found, key=lambda visit: visit.opened)
        else:
            first = nsmallest(limit, found, key=lambda visit: visit.outbox.position)
        return {"streams": [self._row(visit) for visit in first], "total": len(found)}

    def _row(self, visit: Visit) -> dict[str, Any]:
        narrowed, outbox = visit.narrowed, visit.outbox
        seconds = time.monotonic() - visit.opened
        since = datetime.fromtimestamp(time.time() - seconds, UTC).isoformat(timespec="seconds")
        return {
            "id": visit.id,
            "peer": visit.client,
            "who": visit.subject,
            "worker": self._worker,
            "since": since.replace("+00:00", "Z"),
            "seconds": round(seconds, 1),
            "state": "live" if outbox.caught_up else "catching up",
            "position": outbox.position,
            "lag": max(0, self._sequencer.head - outbox.position),
            "queued": outbox.queued,
            "filter": None if narrowed is None else {
                "sources": sorted(narrowed.sources),
                "uriPatterns": sorted([*narrowed.uris, *(f"{p}*" for p in narrowed.uri_prefixes)]),
                "values": sorted(narrowed.values),
            },
        }  # fmt: skip

    def cut(self, stream_id: str, by: str) -> bool:
        """End one stream for the operator `by`; return whether it is here."""
        visit = self._open.get(stream_id)
        if visit is None:
            return False
        log.warning("stream cut", extra={"id": visit.id, "peer": visit.client, "by": by})
        visit.outbox.close(StreamCut("an operator has ended this stream"))
        return True

    def stop(self) -> None:
        """End every stream, and refuse new ones."""
        self._stopping = True
        for visit in tuple(self._open.values()):
            visit.outbox.close(ServerStopping("the server is stopping; reconnect with the last id"))

    async def _start(self, cursor: int | None, epoch: str | None) -> int:
        """Return the cursor to start from; raise FutureCursor, EpochChanged or NotReady."""
        self._admit()
        if not self._sequencer.started.is_set():
            try:
                async with asyncio.timeout(START_WAIT_SECONDS):
                    await self._sequencer.started.wait()
            except TimeoutError:
                raise NotReady("the sequencer has no head yet") from None
        if epoch is not None and epoch != self._sequencer.epoch:
            # Its cursor may well exist here, and stand for another label: never guess.
            raise EpochChanged(
                f"epoch {epoch[:60]!r} is over, this is {self._sequencer.epoch}: seqs name other "
                "labels now; start anew, from cursor 0 or live"
            )
        if cursor is None:
            return self._sequencer.head
        if cursor > self._sequencer.head:
            # From a neighbour that is ahead of this process? Then the database knows it already.
            try:
                newest = await self._store.newest()
            except DatabaseUnavailable as error:
                raise NotReady("the database is away: the cursor cannot be looked up") from error
            if cursor > max(newest, self._sequencer.head):
                raise FutureCursor(f"cursor {cursor} is beyond the newest seq, which is {newest}")
        return cursor

    def _admit(self) -> None:
        """Raise what keeps one more stream from opening."""
        if self._stopping:
            raise NotReady("the server is stopping")
        if self.full():
            most = self._settings.max_streams
            raise TooManyConnections(f"{most} streams are open, the most here")

    def full(self) -> bool:
        """Tell whether as many streams are open as may be."""
        return len(self._open) >= self._settings.max_streams

    def _label_socket(self, request: web.Request, visit: Visit, start: int) -> LabelSocket:
        ended = partial(self._ended, visit)
        socket = LabelSocket(
            request, visit.outbox, self._messages, self._metrics, self._settings,
            start=start, ended=ended,
        )  # fmt: skip
        self._add_headers(socket)
        return socket

    def _event_stream(self, request: web.Request, visit: Visit, start: int) -> EventStream:
        stream = EventStream(
            request,
            visit.outbox,
            self._metrics,
            self._settings,
            start=start,
            opening=self._opening(start),
            ended=partial(self._ended, visit),
        )
        self._add_headers(stream)
        return stream

    def _add_headers(self, answer: web.StreamResponse) -> None:
        answer.headers["Sse-Labels-Head"] = str(self._sequencer.head)
        answer.headers["Sse-Labels-Epoch"] = self._sequencer.epoch or ""
        if self._auth.protected:
            # A shared cache must not keep what came by cookie or URL.
            answer.headers[hdrs.CACHE_CONTROL] = "no-store, no-transform"

    def _opening(self, start: int) -> bytes:
        """Return the first block; it has what `EventSource` hides of the headers from a page."""
        return encode_opening(
            retry_ms(self._settings),
            start,
            f"streaming what comes after {start}",
            cursor=start,
            head=self._sequencer.head,
            epoch=self._sequencer.epoch,
            heartbeatSeconds=self._settings.heartbeat_seconds,
        )

    async def _head(self, request: web.Request) -> web.StreamResponse:
        """Answer as a stream begins, without its body, and hold nothing."""
        response = web.StreamResponse(headers=HEADERS)
        self._add_headers(response)
        await response.prepare(request)
        await response.write_eof()
        return response

    async def _refuse(
        self, request: web.Request, error: RequestError, *, final: bool
    ) -> web.StreamResponse:
        self._metrics.requests_refused[error.name] += 1
        return await refuse(request, error, final=final)

    async def _busy(
        self, request: web.Request, error: RequestError, position: int | None
    ) -> web.StreamResponse:
        self._metrics.requests_refused[error.name] += 1
        response = web.StreamResponse(headers=HEADERS)
        response.force_close()
        await response.prepare(request)
        retry = BUSY_RETRY_FACTOR * retry_ms(self._settings)
        last = encode_error(error.name, str(error), cursor=position, retry_ms=retry)
        await response.write_eof(b"" if request.method == hdrs.METH_HEAD else last)
        return response
