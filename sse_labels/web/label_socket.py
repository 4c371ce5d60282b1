"""The answer to `subscribeLabels` with a WebSocket upgrade.

Promises: the lexicon's messages, in the same order and from the same outbox as the event
stream. A client that should reconnect gets no answer that its software treats as final.
Does not belong here: when something is written (`delivery`), the format of a message (`xrpc`).

The end of a stream decides whether a client reconnects. `@atproto/xrpc-server` (0.10) reconnects
when the connection breaks without a close frame, and treats every close frame as final. The
Python SDK (0.0.73) treats 1000 and 1001 as final. So a stopping server breaks the connection
without a close frame. Every other end is an error message and a close frame with 1008.
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

#: Clients send control frames only, of at most 125 bytes (RFC 6455, 5.5).
MAX_MESSAGE_BYTES = 4096
#: aiohttp (3.14) also refuses a message of exactly `max_msg_size` bytes.
_OVER = MAX_MESSAGE_BYTES + 1
#: How long the server waits for the client's close frame.
CLOSE_SECONDS = 5.0
#: The memory of one entry besides its bytes: its place, references, and a number.
ENTRY_BYTES = 200


class Messages:
    """The wire for WebSockets: one message for each event, and pings as heartbeats.

    Messages are encoded from the frames when the first consumer needs them. So a server whose
    consumers all read Server-Sent Events pays nothing, and both wires carry the same labels.
    The messages of a chunk are kept for its other consumers. The message of each event is kept
    for consumers with other filters or other chunk bounds. The newest messages are kept, up to
    `max_bytes`. The messages of the newest chunk are kept even when they alone exceed that.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        #: Messages by the frame of an event, or by the wire bytes of a chunk.
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
        """Return nothing: only events move the cursor of the lexicon."""
        return b""

    def heartbeat(self) -> bytes:
        """Return a ping."""
        return HEARTBEAT

    def info(
        self, name: str, message: str, *, position: int | None = None, **more: object
    ) -> bytes:
        """Return an `#info` message. The lexicon gives it no seq."""
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
        """Stream from cursor `start` with `messages`. `ended` as in `EventStream`."""
        super().__init__(timeout=CLOSE_SECONDS, autoping=True, compress=False, max_msg_size=_OVER)
        if request.transport is None:
            raise ConnectionResetError("the client left")
        self._transport = request.transport
        self._listening: asyncio.Task[None] | None = None
        self.delivery = Delivery(
            request.transport, outbox, messages, metrics, settings, start=start, ended=ended
        )

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Answer the handshake."""
        writer = await super().prepare(request)
        if isinstance(request.protocol, ClientConnection):
            request.protocol.upgraded()
        self.delivery.writer = writer
        return writer

    def write_eof(self) -> Coroutine[Any, Any, None]:  # type: ignore[override]
        """Return the coroutine that delivers."""
        return self._deliver()

    async def _deliver(self) -> None:
        # This answer alone owns the task, and ends it.
        self._listening = asyncio.create_task(self._listen(), name="listening to a consumer")
        try:
            await self.delivery.run(self)
        finally:
            self._listening.cancel()

    async def _listen(self) -> None:
        """Receive, so that aiohttp answers pings and a close. All other messages are ignored."""
        async for message in self:
            if message.type is WSMsgType.ERROR:
                break
        if not self.closed:
            self._transport.close()

    async def begin(self) -> int:
        """Write nothing: the first message is the first event."""
        return 0

    async def finish(self, name: str, message: str) -> None:
        """Send the error and close, or break the connection when the client should reconnect."""
        if name == ServerStopping.name:
            self._transport.close()
            return
        self.delivery.send(encode_error(name, message))
        await self.close(code=CLOSE_POLICY, message=name.encode("ascii"))


def wants_socket(request: web.Request) -> bool:
    """Return whether the request is a WebSocket handshake.

    Raises InvalidRequest or UpgradeRequired for a wrong handshake.
    """
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
    """Return the origin of a page of another host. None for this host, or without an origin.

    Ports are not compared: cookies are not bound to a port, and proxies leave the port out.
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
    """Answer the handshake, then send the error when it is `final`, or break the connection.

    After a broken connection the client reconnects. After a 503 in place of the handshake it would
    never reconnect, because `ws` does not report the status code.
    """
    socket = web.WebSocketResponse(timeout=CLOSE_SECONDS, compress=False, max_msg_size=_OVER)
    writer = await socket.prepare(request)
    if final:
        await writer.write(encode_error(error.name, str(error)))
        await socket.close(code=CLOSE_POLICY, message=error.name.encode("ascii"))
    elif request.transport is not None:
        request.transport.close()
    return socket
