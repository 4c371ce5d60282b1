"""`GET /stream`: one HTTP response that does not end.

Promises: whatever is wrong with a request is answered before the status line;
after it, each event reaches the socket once and in order, written by nobody but
the one task of this request; a client that does not read is cut in bounded time.
Stands at the end of the corridor: outbox -> stream -> socket.
Does not belong here: which events there are, and how they are encoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterator

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from sse_labels.chunk import Chunk
from sse_labels.config import Settings
from sse_labels.errors import (
    BrokenPromise,
    DatabaseUnavailable,
    EpochChanged,
    FutureCursor,
    NotReady,
    RequestError,
    ServerStopping,
    StreamClosed,
    TokenExpired,
    TooManyConnections,
    TooManyFromAddress,
)
from sse_labels.filters import Filter
from sse_labels.metrics import Metrics
from sse_labels.outbox import CaughtUp, Events, Outbox, Outdated, Silence, Step
from sse_labels.pages import Pages
from sse_labels.sequencer import Sequencer
from sse_labels.shared import Share
from sse_labels.shared.counts import Tally
from sse_labels.sse import HEARTBEAT, encode_error, encode_id, encode_info, encode_opening
from sse_labels.store import Store
from sse_labels.web.addresses import PerAddress, TrustedProxies
from sse_labels.web.auth import Grant, StreamAuth, narrow
from sse_labels.web.connection import reset
from sse_labels.web.parameters import request_filter, stream_cursor

log = logging.getLogger(__name__)

HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    # nginx: do not gather the response into blocks (ngx_http_proxy_module).
    "X-Accel-Buffering": "no",
}
#: How long a stream that opens before the sequencer's start waits for it, in seconds.
START_WAIT_SECONDS = 5.0
#: What a client that came to a full server waits, as a multiple of the usual retry.
BUSY_RETRY_FACTOR = 10


class StreamHandler:
    """Answers `GET /stream`, and knows all streams that are open."""

    def __init__(
        self,
        sequencer: Sequencer,
        pages: Pages,
        store: Store,
        metrics: Metrics,
        proxies: TrustedProxies,
        auth: StreamAuth,
        settings: Settings,
        share: Share | None = None,
    ) -> None:
        """`share` is what the server's other processes hold, if it has any."""
        self._sequencer = sequencer
        self._pages = pages
        self._store = store
        self._metrics = metrics
        self._settings = settings
        self._proxies = proxies
        self._auth = auth
        self._per_address = PerAddress(
            settings.max_per_address, proxies.trusts, share.streams_by_address if share else None
        )
        self._places = share.streams if share else Tally.alone()
        self._open: set[Outbox] = set()
        self._stopping = False
        metrics.gauges["streams"] = lambda: len(self._open)
        metrics.gauges["streams_backfilling"] = lambda: sum(not o.caught_up for o in self._open)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Stream until the client leaves, the consumer lags or the server stops."""
        # Before all else: 401 and 403 are final for a browser too.
        grant = self._auth.authorize(request)
        cursor = stream_cursor(request)
        narrowed = narrow(request_filter(request), grant)
        client = self._proxies.client(request)
        with contextlib.ExitStack() as held:
            try:
                start = await self._start(cursor, request.query.get("epoch"))
                held.enter_context(self._place())
                held.enter_context(self._per_address.hold(client))
            except (TooManyConnections, TooManyFromAddress, NotReady, EpochChanged) as error:
                held.close()
                if "text/event-stream" in request.headers.get(hdrs.ACCEPT, ""):
                    # A browser takes any other status than 200 for final, and never comes back.
                    return await self._busy(request, error)
                raise
            return await self._stream(request, client, start, cursor, narrowed, grant)

    async def _stream(
        self,
        request: web.Request,
        client: str,
        start: int,
        cursor: int | None,
        narrowed: Filter | None,
        grant: Grant,
    ) -> web.StreamResponse:
        outbox = Outbox(
            self._sequencer,
            self._pages,
            self._metrics,
            narrowed=narrowed,
            page_max_events=self._settings.page_max_events,
            max_events=self._settings.outbox_max_events,
            heartbeat_seconds=self._settings.heartbeat_seconds,
        )
        self._open.add(outbox)
        expiry = self._end_at(outbox, grant.expires_at)
        opened = time.monotonic()
        how = "ClientGone"
        log.info("stream opened: peer=%s cursor=%s filter=%s", client, cursor, narrowed)
        try:
            response = self._response(request)
            writer = await response.prepare(request)
            if writer is not None and request.transport is not None:
                stream = Stream(request, response, writer, outbox, self._metrics, self._settings)
                how = await stream.run(start, self._opened(start))
            return response
        finally:
            if expiry is not None:
                expiry.cancel()
            self._open.discard(outbox)
            self._metrics.streams_ended[how] += 1
            log.info(
                "stream closed: peer=%s how=%s seconds=%.1f position=%s",
                client, how, time.monotonic() - opened, outbox.position,
            )  # fmt: skip

    def _end_at(self, outbox: Outbox, expires_at: float | None) -> asyncio.TimerHandle | None:
        """End the stream when its token does."""
        if expires_at is None:
            return None
        expired = TokenExpired("the token has expired; reconnect with a new one and the last id")
        seconds = max(0.0, expires_at - time.time())
        return asyncio.get_running_loop().call_later(seconds, outbox.close, expired)

    def stop(self) -> None:
        """End every stream, and refuse new ones."""
        self._stopping = True
        for outbox in tuple(self._open):
            outbox.close(ServerStopping("the server is stopping; reconnect with the last id"))

    async def _start(self, cursor: int | None, epoch: str | None) -> int:
        """Return the cursor to start from; raise FutureCursor, EpochChanged or NotReady."""
        self._admit()
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
        if self._places.everywhere() >= self._settings.max_streams:
            raise self._full()

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Be one of the streams for the block; raise what keeps one more from opening."""
        self._admit()
        if not self._places.take(self._settings.max_streams):
            raise self._full()
        try:
            yield
        finally:
            self._places.give_back()

    def _full(self) -> TooManyConnections:
        return TooManyConnections(f"{self._settings.max_streams} streams are open, the most here")

    def _response(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=HEADERS)
        response.headers["Sse-Labels-Head"] = str(self._sequencer.head)
        if self._auth.protected:
            # A shared cache must not keep what came by cookie or URL.
            response.headers[hdrs.CACHE_CONTROL] = "no-store, no-transform"
        response.headers["Sse-Labels-Epoch"] = self._sequencer.epoch or ""
        if request.version >= (1, 1):
            response.enable_chunked_encoding()
        return response

    def _opened(self, start: int) -> bytes:
        """Return what a page can read of the headers that `EventSource` hides from it."""
        message = f"streaming what comes after {start}"
        head, epoch = self._sequencer.head, self._sequencer.epoch
        return encode_info("StreamOpened", message, cursor=start, head=head, epoch=epoch)

    async def _busy(self, request: web.Request, error: RequestError) -> web.StreamResponse:
        self._metrics.requests_refused[error.name] += 1
        response = web.StreamResponse(headers=HEADERS)
        response.force_close()
        await response.prepare(request)
        retry = BUSY_RETRY_FACTOR * retry_ms(self._settings)
        await response.write(encode_error(error.name, str(error), cursor=None, retry_ms=retry))
        await response.write_eof()
        return response


class Stream:
    """Writes what one outbox yields to one socket."""

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        writer: AbstractStreamWriter,
        outbox: Outbox,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        assert request.transport is not None  # noqa: S101 - the handler looked
        self._transport = request.transport
        self._response = response
        self._writer = writer
        self._chunked = request.version >= (1, 1)
        self._outbox = outbox
        self._metrics = metrics
        self._settings = settings
        self._deadline: asyncio.Timeout | None = None
        self._now = asyncio.get_running_loop().time
        self._wrote = self._now()
        #: The last seq that the client was told.
        self._told = 0

    async def run(self, start: int, news: bytes) -> str:
        """Stream from `start`, `news` right after the opening; return how it ended."""
        # Any byte that the kernel does not take pauses the writer: backpressure begins at once.
        self._transport.set_write_buffer_limits(high=0)
        self._outbox.on_close = self._hurry
        self._outbox.express = self._express
        try:
            await self._response.write(encode_opening(retry_ms(self._settings), start) + news)
            self._told = start
            await self._drain()
            async with contextlib.aclosing(self._outbox.events(start)) as steps:
                return await self._write_all(steps)
        except TimeoutError:
            reset(self._transport)
            return self._outbox.closed.name if self._outbox.closed else "SendTimeout"
        except ConnectionError:
            return "ClientGone"

    async def _write_all(self, steps: AsyncGenerator[Step, None]) -> str:
        try:
            async for step in steps:
                self._write(step)
                await self._drain()
        except StreamClosed as closed:
            await self._end(closed.name, str(closed))
            return closed.name
        except BrokenPromise as error:
            self._metrics.count["broken_promises"] += 1
            log.exception("a stream is ended, a promise is broken")
            await self._end("InternalServerError", str(error))
            return "BrokenPromise"
        return "ClientGone"

    def _write(self, step: Step) -> None:
        match step:
            case Events(chunks):
                self._write_chunks([chunk for chunk in chunks if chunk.seqs])
            case Silence():
                self._tell_position(otherwise=HEARTBEAT)
            case CaughtUp():
                self._tell_position(otherwise=b"")
            case Outdated(cursor, floor):
                message = f"cursor {cursor} is below the floor: going on from seq {floor}"
                self._send_block(encode_info("OutdatedCursor", message, floor=floor))

    def _write_chunks(self, chunks: list[Chunk]) -> None:
        if not chunks:
            self._break_silence()
            return
        wire = [chunk.wire if self._chunked else chunk.data for chunk in chunks]
        self._send(wire[0] if len(wire) == 1 else b"".join(wire))
        self._metrics.events_delivered += sum(map(len, chunks))
        self._told = chunks[-1].seqs[-1]

    def _express(self, chunk: Chunk) -> bool:
        """Write a live chunk from the sequencer's step; say whether the kernel took all of it."""
        if self._transport.is_closing():
            return False
        self._write_chunks([chunk])
        return self._transport.get_write_buffer_size() == 0

    def _break_silence(self) -> None:
        """Write a heartbeat when it is due although events come: the filter hides them all."""
        if self._now() - self._wrote >= self._settings.heartbeat_seconds:
            self._tell_position(otherwise=HEARTBEAT)

    def _tell_position(self, otherwise: bytes) -> None:
        """Write the position when events were hidden since the last write, so that it is kept."""
        if self._outbox.position > self._told:
            self._told = self._outbox.position
            self._send_block(encode_id(self._told))
        elif otherwise:
            self._send_block(otherwise)

    def _send_block(self, block: bytes) -> None:
        self._send(b"%x\r\n%b\r\n" % (len(block), block) if self._chunked else block)

    def _send(self, wire: bytes) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client left")
        # Straight to the transport: the chunk carries HTTP's framing already, and aiohttp's own
        # write would copy it once per connection.
        self._transport.write(wire)
        self._wrote = self._now()
        self._metrics.bytes_delivered += len(wire)

    async def _drain(self) -> None:
        """Wait until the kernel has taken everything; raise TimeoutError when it does not."""
        if self._transport.get_write_buffer_size() == 0:
            return
        seconds = self._settings.send_timeout_seconds
        if self._outbox.closed is not None:
            seconds = min(seconds, self._grace_seconds())
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                await self._writer.drain()
        finally:
            self._deadline = None

    def _hurry(self) -> None:
        """The outbox closed: the write that may be stuck gets its grace and no more."""
        # An expiring time-out cannot be moved any more, and need not be.
        if self._deadline is not None and not self._deadline.expired():
            grace = self._now() + self._grace_seconds()
            when = self._deadline.when()
            self._deadline.reschedule(grace if when is None else min(when, grace))

    async def _end(self, name: str, message: str) -> None:
        # One bound for all of it; aiohttp's write_eof waits without one of its own.
        async with asyncio.timeout(self._grace_seconds()):
            await self._writer.drain()
            retry = retry_ms(self._settings)
            self._send_block(encode_error(name, message, cursor=self._told, retry_ms=retry))
            await self._response.write_eof()
            await self._writer.drain()
        self._response.force_close()

    def _grace_seconds(self) -> float:
        """Return how long the last bytes may wait: when the server stops, others wait for it."""
        grace = self._settings.slow_grace_seconds
        if isinstance(self._outbox.closed, ServerStopping):
            # A write that is stuck now and the last event after it share what draining has.
            return min(grace, self._settings.drain_seconds / 2)
        return grace


def retry_ms(settings: Settings) -> int:
    """Return how long a client shall wait before it reconnects; each gets another time."""
    low, high = settings.retry_min_seconds, settings.retry_max_seconds
    return round(1000 * random.uniform(low, high))  # noqa: S311 - spreads load, keeps no secret
