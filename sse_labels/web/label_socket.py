"""The answer to `subscribeLabels` with a WebSocket upgrade.

Promises: the lexicon's messages, in the same order and from the same outbox as the event
stream; a client that shall come back is not told that all is over.
Does not belong here: when something is written (`delivery`), how a message looks (`xrpc`).

How a stream ends decides whether a client comes back. `@atproto/xrpc-server` (0.10) reconnects
when the connection breaks without a close frame, and takes any close for the end;
the Python SDK (0.0.73) takes 1000 and 1001 for the end. So a server that stops breaks off, and
what the client has to know comes as an error message and a close with 1008.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from sys import getsizeof
from typing import Any
from urllib.parse import urlsplit

from aiohttp import WSMsgType, hdrs, web
from aiohttp.abc import AbstractStreamWriter

from sse_labels.config import Settings
from sse_labels.errors import InvalidRequest, RequestError, ServerStopping, UpgradeRequired
from sse_labels.feed.chunk import Chunk
from sse_labels.feed.outbox import Outbox
from sse_labels.metrics import Metrics
from sse_labels.protocol.notice import Notice
from sse_labels.protocol.sse import decode_frame
from sse_labels.protocol.xrpc import (
    CLOSE_POLICY,
    HEARTBEAT,
    encode_error,
    encode_info,
    encode_labels,
)
from sse_labels.web.delivery import Delivery
from sse_labels.web.door.aiohttp_seams import LongAnswer
from sse_labels.web.door.connection import ClientConnection

#: Clients have nothing to say; a control frame has 125 bytes at most (RFC 6455, 5.5).
MAX_MESSAGE_BYTES = 4096
#: aiohttp (3.14) refuses a message of as many bytes as its `max_msg_size`, too.
_OVER = MAX_MESSAGE_BYTES + 1
#: How long a client has to answer a close with its own.
CLOSE_SECONDS = 5.0
#: What one entry takes beside its bytes: its place, references, and a number.
ENTRY_BYTES = 200


class Messages:
    """The wire: one message for each event, pings while all is quiet.

    Messages are encoded out of the frames when the first consumer asks: whoever reads
    Server-Sent Events alone pays nothing, and both carry the same. Those of a chunk are kept for
    its other consumers, and those of each event for other filters and other places in the chunk:
    the newest ones up to `max_bytes`, or one chunk's when that alone is more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        #: By the frame of an event, and by the wire of a chunk.
        self._kept: dict[bytes, bytes] = {}
        self.nbytes = 0

    def events(self, chunk: Chunk) -> bytes:
        """Return one message for each event."""
        kept = self._kept.get(chunk.wire)
        if kept is not None or not chunk.seqs:
            return kept or b""
        return self._keep(chunk.wire, b"".join(map(self._message, chunk.frames())))

    def _message(self, frame: bytes) -> bytes:
        kept = self._kept.get(frame)
        return self._keep(frame, encode_labels(*decode_frame(frame))) if kept is None else kept

    def _keep(self, coded: bytes, messages: bytes) -> bytes:
        self._kept[coded] = messages
        self.nbytes += _nbytes(coded, messages)
        while self.nbytes > self._max_bytes and len(self._kept) > 1:
            oldest = next(iter(self._kept))
            self.nbytes -= _nbytes(oldest, self._kept.pop(oldest))
        return messages

    def position(self, seq: int) -> bytes:
        """Return nothing: the lexicon's cursor moves by events alone."""
        return b""

    def heartbeat(self) -> bytes:
        """Return a ping."""
        return HEARTBEAT

    def info(
        self, name: str, message: str, *, position: int | None = None, **more: object
    ) -> bytes:
        """Return an `#info` message; the lexicon gives it no seq."""
        return encode_info(name, message, **more)

    def notice(self, notice: Notice) -> bytes:
        """Return its `#info` message."""
        return notice.message


def _nbytes(coded: bytes, messages: bytes) -> int:
    return ENTRY_BYTES + getsizeof(coded) + getsizeof(messages)


class LabelSocket(web.WebSocketResponse, LongAnswer):
    """Writes what one outbox yields as messages of `com.atproto.label.subscribeLabels`."""

    def __init__(
        self,
        request: web.Request,
        outbox: Outbox,
        metrics: Metrics,
        settings: Settings,
        *,
        messages: Messages,
        start: int,
        ended: Callable[[str], None],
    ) -> None:
        """Stream from cursor `start` by `messages`; `ended` as for an event stream."""
        super().__init__(timeout=CLOSE_SECONDS, autoping=True, compress=False, max_msg_size=_OVER)
        if request.transport is None:
            raise ConnectionResetError("the client left")
        self._transport = request.transport
        self._listening: asyncio.Task[None] | None = None
        self.delivery = Delivery(
            request.transport, outbox, messages, metrics, settings, start=start, ended=ended
        )

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Shake hands."""
        writer = await super().prepare(request)
        if isinstance(request.protocol, ClientConnection):
            request.protocol.upgraded()
        self.delivery.writer = writer
        return writer

    def write_eof(self) -> Coroutine[Any, Any, None]:  # type: ignore[override]
        """Return the delivery, as an event stream does."""
        return self._deliver()

    async def _deliver(self) -> None:
        # The one owner of this task is this answer: it ends with it.
        self._listening = asyncio.create_task(self._listen(), name="listening to a consumer")
        try:
            await self.delivery.run(self)
        finally:
            self._listening.cancel()

    async def _listen(self) -> None:
        """Answer pings and a close (aiohttp does, while this waits); ignore all else."""
        async for message in self:
            if message.type is WSMsgType.ERROR:
                break
        if not self.closed:
            self._transport.close()

    async def begin(self) -> int:
        """Write nothing: the first message is the first event."""
        return 0

    async def finish(self, name: str, message: str) -> None:
        """Say why it ends and close, or break off when the client shall come back."""
        if name == ServerStopping.name:
            self._transport.close()
            return
        self.delivery.send(encode_error(name, message))
        await self.close(code=CLOSE_POLICY, message=name.encode("ascii"))


def wants_socket(request: web.Request) -> bool:
    """Say whether it asks for a WebSocket; raise InvalidRequest when it does so wrongly."""
    if request.headers.get("Upgrade", "").strip().lower() != "websocket":
        return False
    if request.version < (1, 1):
        raise InvalidRequest("expected a WebSocket handshake over HTTP/1.1 (RFC 6455, 4.1)")
    if request.headers.get(hdrs.SEC_WEBSOCKET_VERSION, "").strip() != "13":
        raise UpgradeRequired("expected Sec-WebSocket-Version: 13")
    if not web.WebSocketResponse().can_prepare(request):
        raise InvalidRequest("expected a WebSocket handshake (RFC 6455, section 4.2.1)")
    return True


def page_elsewhere(request: web.Request) -> str | None:
    """Return the origin of a page that is not of this host; None for one that is, and others.

    Ports are not compared: cookies know none, and proxies leave them out.
    """
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return None
    try:
        same = urlsplit(origin).hostname == urlsplit(f"//{request.host}").hostname
    except ValueError:
        same = False
    return None if same else origin


async def refuse(request: web.Request, error: RequestError, *, final: bool) -> web.StreamResponse:
    """Shake hands and say why not; unless that is `final`, break off, so that it comes back.

    A client that is answered 503 before the handshake never comes back: `ws` gives no code.
    """
    socket = web.WebSocketResponse(timeout=CLOSE_SECONDS, compress=False, max_msg_size=_OVER)
    writer = await socket.prepare(request)
    if final:
        await writer.write(encode_error(error.name, str(error)))
        await socket.close(code=CLOSE_POLICY, message=error.name.encode("ascii"))
    elif request.transport is not None:
        request.transport.close()
    return socket
