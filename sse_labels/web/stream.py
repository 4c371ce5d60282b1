"""`GET /stream` and `subscribeLabels`: check the request, and open the stream.

Promises: an error in a request is found before the status line is sent. A client that should
reconnect later gets an answer after which its software does reconnect.
Does not belong here: the registry of streams (`streams`), what a stream writes (`delivery`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from aiohttp import hdrs, web

from sse_labels.config import Settings
from sse_labels.errors import (
    DatabaseUnavailable,
    EpochChanged,
    Forbidden,
    FutureCursor,
    NotReady,
    RequestError,
    TooManyConnections,
    TooManyFromAddress,
)
from sse_labels.expiry.expiry import Expiry
from sse_labels.expiry.reader import ExpiryReader
from sse_labels.feed.feed import Feed
from sse_labels.feed.outbox import Outbox
from sse_labels.feed.snapshots import Snapshots
from sse_labels.metrics import Metrics
from sse_labels.protocol.sse import encode_error, encode_opening
from sse_labels.web.addresses import TrustedProxies, caused_by, reader_of
from sse_labels.web.auth import Grant, StreamAuth, within_grant
from sse_labels.web.delivery import retry_ms
from sse_labels.web.event_stream import HEADERS, EventStream
from sse_labels.web.label_socket import (
    LabelSocket,
    Messages,
    page_elsewhere,
    refuse,
    wants_socket,
)
from sse_labels.web.parameters import Asked, stream_asked
from sse_labels.web.streams import OpenStream, Streams

log = logging.getLogger(__name__)

#: How long a request waits for the sequencer's start, in seconds.
START_WAIT_SECONDS = 5.0
#: How long a client waits after a refusal by a full server, as a multiple of the usual retry.
BUSY_RETRY_FACTOR = 10
#: Messages for WebSockets may hold `ring_max_bytes` divided by this number.
MESSAGES_SHARE = 8


class StreamHandler:
    """Answers `GET /stream` and `subscribeLabels`."""

    def __init__(
        self,
        feed: Feed,
        expiry: Expiry,
        streams: Streams,
        metrics: Metrics,
        proxies: TrustedProxies,
        auth: StreamAuth,
        settings: Settings,
    ) -> None:
        self._sequencer = feed.sequencer
        self._pages = feed.pages
        self._store = feed.store
        self._expiry = expiry
        self._streams = streams
        self._metrics = metrics
        self._settings = settings
        self._proxies = proxies
        self._auth = auth
        self._messages = Messages(settings.ring_max_bytes // MESSAGES_SHARE)
        self._snapshots = Snapshots(feed.sequencer)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Return the requested event stream. Raises RequestError."""
        # The grant comes first: 401 and 403 are final for a browser too.
        grant = self._auth.authorize(request)
        asked = self._asked(request, grant)
        try:
            start = await self._start(asked)
            if request.method == hdrs.METH_HEAD:
                return await self._head(request)
            stream = self._let_in(request, grant, asked, start)
        except (TooManyConnections, TooManyFromAddress, NotReady, EpochChanged) as error:
            # A browser treats every status except 200 as final, and never reconnects.
            if "text/event-stream" in request.headers.get(hdrs.ACCEPT, ""):
                return await self._busy(request, error, asked)
            raise
        answer = partial(EventStream, opening=self._opening(start))
        return await self._answer(request, stream, start, answer)

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Return the requested WebSocket, or the event stream when there is no upgrade."""
        if request.method == hdrs.METH_HEAD or not wants_socket(request):
            return await self.handle(request)
        # A browser lets every page open WebSockets, and sends this host's cookies.
        elsewhere = page_elsewhere(request)
        if elsewhere and not {"*", elsewhere} & set(self._settings.cors_origins):
            raise Forbidden("pages of this origin may not read here")
        grant = self._auth.authorize(request, by_cookie=not elsewhere)
        asked = self._asked(request, grant)
        try:
            start = await self._start(asked)
            stream = self._let_in(request, grant, asked, start)
        except (FutureCursor, EpochChanged) as error:
            return await self._refuse(request, error, final=True)
        except (TooManyConnections, TooManyFromAddress, NotReady) as error:
            return await self._refuse(request, error, final=False)
        answer = partial(LabelSocket, messages=self._messages)
        return await self._answer(request, stream, start, answer)

    def _asked(self, request: web.Request, grant: Grant) -> Asked:
        """Return what is asked for, within the grant. Raises InvalidRequest or Forbidden."""
        asked = stream_asked(request, self._expiry.clock())
        return asked._replace(filter=within_grant(asked.filter, grant))

    async def _start(self, asked: Asked) -> int:
        """Return the start cursor.

        Raises FutureCursor, EpochChanged, NotReady or TooManyConnections.
        """
        self._streams.check_room()
        if not self._sequencer.started.is_set():
            try:
                async with asyncio.timeout(START_WAIT_SECONDS):
                    await self._sequencer.started.wait()
            except TimeoutError:
                raise NotReady("the sequencer has no head yet") from None
        if asked.epoch is not None and asked.epoch != self._sequencer.epoch:
            # The cursor may exist in this epoch too, but as the seq of another label: never guess.
            raise EpochChanged(
                f"epoch {asked.epoch[:60]!r} has ended, the epoch is now {self._sequencer.epoch}. "
                "The same seqs now mean other labels. Start again from cursor 0 or live"
            )
        cursor = asked.position(self._sequencer.head)
        if cursor > self._sequencer.head:
            # A neighbour that is ahead may have sent this cursor. Then the database has its seq.
            try:
                newest = await self._store.newest()
            except DatabaseUnavailable as error:
                raise NotReady("the database is away: the cursor cannot be looked up") from error
            if cursor > max(newest, self._sequencer.head):
                raise FutureCursor(f"cursor {cursor} is beyond the newest seq, which is {newest}")
        return cursor

    def _let_in(self, request: web.Request, grant: Grant, asked: Asked, start: int) -> OpenStream:
        """Register and return a new stream. Raises RequestError."""
        client = self._proxies.client(request)
        reader = reader_of(client, grant.subject)
        filter = asked.filter
        snapshot, since = None, asked.expired_since
        if asked.state:
            snapshot, since = self._snapshots.begin(start, since, self._expiry.clock())
        outbox = Outbox(
            self._sequencer,
            self._pages,
            self._metrics,
            client=reader,
            filter=filter,
            page_max_events=self._settings.page_max_events,
            max_events=self._settings.outbox_max_events,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            snapshot=snapshot,
            expiries=(None if since is None else ExpiryReader(self._expiry, reader, filter, since)),
        )
        stream = self._streams.let_in(outbox, client, filter, grant.subject, grant.expires_at)
        fields = {"cursor": asked.cursor, "filter": filter, "id": stream.id, "opens": stream.id}
        log.info("stream opened", extra=caused_by(client, **fields))
        return stream

    async def _answer(
        self,
        request: web.Request,
        stream: OpenStream,
        start: int,
        answer: Callable[..., EventStream | LabelSocket],
    ) -> web.StreamResponse:
        """Begin the answer. A begun answer itself reports the end of the stream."""
        ended = partial(self._streams.ended, stream)
        try:
            response = answer(
                request, stream.outbox, self._metrics, self._settings, start=start, ended=ended
            )
            response.headers.update(self._headers())
            await response.prepare(request)
        except BaseException:
            ended("ClientGone")
            raise
        # From here on nothing awaits until aiohttp calls `write_eof`.
        return response

    def _headers(self) -> dict[str, str]:
        """Return what every stream's head says beside `HEADERS`."""
        headers = {
            "Sse-Labels-Head": str(self._sequencer.head),
            "Sse-Labels-Epoch": self._sequencer.epoch or "",
        }
        if self._auth.protected:
            # A shared cache must not keep an answer whose token was in a cookie or URL.
            headers[hdrs.CACHE_CONTROL] = "no-store, no-transform"
        return headers

    def _opening(self, start: int) -> bytes:
        """Return the first block. It repeats headers, which `EventSource` hides from a page."""
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
        """Answer HEAD with the headers of a stream, without opening one."""
        response = web.StreamResponse(headers=HEADERS | self._headers())
        await response.prepare(request)
        await response.write_eof()
        return response

    async def _refuse(
        self, request: web.Request, error: RequestError, *, final: bool
    ) -> web.StreamResponse:
        self._metrics.requests_refused[error.name] += 1
        return await refuse(request, error, final=final)

    async def _busy(
        self, request: web.Request, error: RequestError, asked: Asked
    ) -> web.StreamResponse:
        """Answer with a stream that ends at once, with the time and the id for the reconnect."""
        self._metrics.requests_refused[error.name] += 1
        # After EpochChanged the head belongs to an epoch that the client does not have.
        known = self._sequencer.started.is_set() and not isinstance(error, EpochChanged)
        position = asked.position(self._sequencer.head if known else None)
        response = web.StreamResponse(headers=HEADERS)
        response.force_close()
        await response.prepare(request)
        retry = BUSY_RETRY_FACTOR * retry_ms(self._settings)
        last = encode_error(error.name, str(error), cursor=position, retry_ms=retry)
        await response.write_eof(b"" if request.method == hdrs.METH_HEAD else last)
        return response
