"""One TCP connection: aiohttp's protocol, and beside it what its client owes us.

Promises: a request that does not become whole, and an answer that nobody takes, end
in bounded time and hold bounded memory; what is not HTTP is answered in JSON; an open
stream is never ended here, unless its client sends on and on, and costs no timer.
Does not belong here: how many connections there are, what a request means.

aiohttp 3.14 bounds the time for a head by `keepalive_timeout` alone, which must outlast
the one of a proxy; a client that does not take its answer holds its connection for ever;
32 heads of 800 kB may be sent ahead and wait behind a stream; and a traceback is logged
for each request that is none.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from aiohttp import StreamReader, hdrs, web

from sse_labels.errors import (
    HeadTooLarge,
    InvalidRequest,
    RequestError,
    RequestTimeout,
    UnsupportedMediaType,
)
from sse_labels.web.addresses import caused_by
from sse_labels.web.answers import SECURITY_HEADERS, error_response
from sse_labels.web.door.aiohttp_seams import ContentEncodingError, LineTooLong, Protocol
from sse_labels.web.door.refusal import encode_answer

log = logging.getLogger(__name__)

#: One header line with its name, and the request line: aiohttp's default, as in Apache and nginx.
MAX_FIELD_BYTES = 8190
#: Header lines: Apache's default.
MAX_FIELDS = 100
#: A head that is not whole by then, or whole ones sent ahead while a request is handled.
MAX_HEAD_BYTES = 64 * 1024
#: How long what is left of an unwanted body is read, so that no reset overtakes the answer.
LINGERING_SECONDS = 2.0
#: What a WebSocket's client may send at once, and in the long run: a pong has 131 bytes at most.
CHATTER_MAX_BYTES = 32 * 1024
CHATTER_BYTES_PER_SECOND = 1024

#: No peer is taken for dead sooner: the kernel's first retransmission to a far one takes a second.
DEAD_MIN_SECONDS = 1.0


class ClientConnection(Protocol):
    """aiohttp's protocol with manners."""

    __slots__ = (
        "_allowance", "_body", "_handling", "_held", "_key", "_tail", "_terms", "_unread", "_wire",
    )  # fmt: skip

    def __init__(
        self, terms: Terms, key: str | None, server: web.Server, loop: asyncio.AbstractEventLoop
    ) -> None:
        """`terms.ended` will be called with `key`, once."""
        super().__init__(server, loop, terms.options)
        self._terms = terms
        self._key = key
        self._held = True
        #: aiohttp forgets its transport while closing; a client that does not read still has it.
        self._wire: asyncio.Transport | None = None
        #: Whether a handler runs, and the body of its request, or of the one before.
        self._handling = False
        self._body: StreamReader | None = None
        #: Bytes that came since the last request was known.
        self._unread = 0
        #: What a WebSocket's client may say; None while it is no WebSocket.
        self._allowance: Allowance | None = None
        #: The last bytes of an incomplete head, None once it is complete.
        self._tail: bytes | None = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; the first head is due."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what asyncio gives for TCP
        self._wire = transport
        self._terms.heads.start(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End; the connection counts no more."""
        self._terms.heads.stop(self)
        self._terms.answers.stop(self)
        self._wire = None
        self.release()
        super().connection_lost(exc)

    def release(self) -> None:
        """Count this connection no more."""
        if self._held:
            self._held = False
            self._terms.ended(self._key)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on, unless they are too many for what they are."""
        # aiohttp calls this itself, with nothing, to go on after a pause.
        if not data or self._admit(data):
            super().data_received(data)

    def _admit(self, data: bytes) -> bool:
        if self._allowance is not None:
            if self._allowance.take(len(data)):
                return True
            # A million empty frames a second kept everybody else waiting for 70 ms, pings 700.
            return self._cut_off("a connection is cut, it sends on and on")
        if self._body is not None and not self._body.is_eof():
            # aiohttp reads it at the handler's pace, or drops it after an answer came early.
            return True
        if not self._unread and not self._handling:
            self._terms.heads.start(self)
        self._unread += len(data)
        if self._handling:
            if self._unread <= MAX_HEAD_BYTES:
                return True
            # Sent ahead of the answer: nobody who streams labels does that.
            return self._cut_off("a connection is cut, it sends on and on")
        if self._tail is not None:
            # Empty lines before a request count, and do not end its head (RFC 9112, 2.2).
            seen = (self._tail + data) if self._tail else data.lstrip(b"\r\n")
            self._tail = None if b"\r\n\r\n" in seen else seen[-3:]
            if self._tail is not None and self._unread > MAX_HEAD_BYTES:
                self._answer(HeadTooLarge(f"expected a head of at most {MAX_HEAD_BYTES} bytes"))
                return False
        return True

    def request_began(self, body: StreamReader) -> None:
        """The head is whole and will be handled: from here on time is the handler's."""
        self._terms.heads.stop(self)
        self._terms.answers.stop(self)
        self._handling = True
        self._body = body
        self._unread = 0
        self._tail = b""

    def upgraded(self) -> None:
        """Take what comes from now on for a WebSocket's, whose client has little to say."""
        self._allowance = Allowance()

    def answer_began(self) -> None:
        """A handler is done: from here on its answer must be taken, or the next request come."""
        self._handling = False
        if self._wire is not None:
            self._terms.answers.start(self)
            if self._unread:
                self._terms.heads.start(self)

    def head_is_late(self) -> None:
        """Answer 408, or end a connection that never said anything."""
        if self._wire is None:
            return
        if self._wire.is_closing() or self._wire.get_write_buffer_size():
            self.cut()
        elif self._unread:
            seconds = self._terms.heads.seconds
            self._answer(RequestTimeout(f"expected the whole head within {seconds:g} s"))
        else:
            self.force_close()

    def answer_is_late(self) -> None:
        """End a connection whose client does not read."""
        self._cut_off("a connection is cut, its client does not read")

    def _cut_off(self, what: str) -> bool:
        log.info(what, extra=caused_by(self._address(), peer=self.peername))
        self.cut()
        return False

    def _address(self) -> str:
        # A Unix socket's name is a text, and often empty.
        return str(self.peername[0]) if isinstance(self.peername, tuple) else ""

    def cut(self) -> None:
        """End it at once, whether its client reads or not."""
        if self._wire is not None:
            reset(self._wire)

    def _answer(self, error: RequestError) -> None:
        """Answer between requests, where nobody else writes, and close."""
        self._terms.refused(error)
        if self._wire is not None:
            self._wire.write(encode_answer(error))
        self.force_close()

    def answer_to_no_request(self, error: BaseException | None) -> web.Response:
        """Answer what is not a request.

        What was sent is not repeated: an answer must not say what a stranger chose.
        """
        refused: RequestError
        if isinstance(error, LineTooLong):
            refused = HeadTooLarge(f"expected lines of at most {MAX_FIELD_BYTES} bytes")
        elif isinstance(error, ContentEncodingError):
            # Of a coding that aiohttp knows by name, and decodes only beside other packages.
            refused = UnsupportedMediaType("expected a body in gzip or deflate, or as it is")
        else:
            refused = InvalidRequest(
                f"expected a request in HTTP/1.1 or HTTP/1.0 with at most {MAX_FIELDS} header lines"
            )
        # Its class alone: the text repeats what was sent, and a token may be in it.
        log.debug(
            "not a request",
            extra=caused_by(self._address(), peer=self.peername, error=type(error).__name__),
        )
        self._terms.refused(refused)
        response = error_response(refused)
        response.headers.update(SECURITY_HEADERS)
        # What follows cannot be told from the rest of it.
        response.headers[hdrs.CONNECTION] = "close"
        return response


def reset(transport: asyncio.WriteTransport) -> None:
    """Reset the connection: the kernel frees what it holds, and the client sees a close.

    A plain abort would leave the socket an orphan that waits for a reader who does not read.
    """
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def end_dead_peers(
    listener: socket.socket, *, quiet_seconds: float, unanswered_seconds: float
) -> None:
    """Let the kernel end what `listener` accepts when its peer answers no more (tcp(7)).

    Without it a peer that vanished is noticed only when the send buffer is full: heartbeats take
    hours for that. What was sent waits `unanswered_seconds` for its acknowledgement; where
    nothing was sent for `quiet_seconds`, the kernel asks. A window that stays closed so long
    counts as no answer (Linux 5.11).
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        limit = max(DEAD_MIN_SECONDS, unanswered_seconds)
        options = {
            socket.TCP_USER_TIMEOUT: round(1000 * limit),
            # After a heartbeat, so that streams cause no packets of this kind.
            socket.TCP_KEEPIDLE: int(quiet_seconds) + 1,
            socket.TCP_KEEPINTVL: max(1, int(limit / 3)),
        }
        for option, value in options.items():
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


class Terms:
    """What is the same for all connections, and whom they tell."""

    def __init__(
        self,
        *,
        request_seconds: float,
        keepalive_seconds: float,
        refused: Callable[[RequestError], None],
        ended: Callable[[str | None], None],
    ) -> None:
        #: What aiohttp's protocol is told.
        self.options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": keepalive_seconds,
            "lingering_time": LINGERING_SECONDS,
            "max_line_size": MAX_FIELD_BYTES,
            "max_field_size": MAX_FIELD_BYTES,
            "max_headers": MAX_FIELDS,
        }
        self.refused = refused
        self.ended = ended
        #: Since the connection was made, or since the first byte of a later head.
        self.heads = Deadlines(request_seconds, ClientConnection.head_is_late)
        #: Since a handler ended. aiohttp ends idle connections by itself, after
        #: `keepalive_seconds`, so what is left then is a client that does not read.
        self.answers = Deadlines(
            keepalive_seconds + request_seconds, ClientConnection.answer_is_late
        )


class Deadlines:
    """Connections that must do something within the same time; one timer for all."""

    def __init__(self, seconds: float, late: Callable[[ClientConnection], None]) -> None:
        self.seconds = seconds
        self._late = late
        # Every entry waits equally long, so the order of insertion is the order of time.
        self._due: dict[ClientConnection, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return how many connections are waited for."""
        return len(self._due)

    def start(self, connection: ClientConnection) -> None:
        """Wait for `connection`; one that is waited for already keeps its time."""
        loop = asyncio.get_running_loop()
        self._due.setdefault(connection, loop.time() + self.seconds)
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._sweep, loop)

    def stop(self, connection: ClientConnection) -> None:
        """Wait no more."""
        self._due.pop(connection, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        late = [one for one, when in takewhile(lambda due: due[1] <= now, self._due.items())]
        for connection in late:
            del self._due[connection]
        if self._due:
            # Not for each one: a tenth later is soon enough, and then for many.
            when = max(next(iter(self._due.values())), now + self.seconds / 10)
            self._timer = loop.call_at(when, self._sweep, loop)
        for connection in late:
            self._late(connection)


class Allowance:
    """What a consumer may send over a WebSocket: pongs, a ping now and then, a close."""

    __slots__ = ("_now", "_whole_at")

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        #: When it may send `CHATTER_MAX_BYTES` at once again.
        self._whole_at = now()

    def take(self, nbytes: int) -> bool:
        """Say whether it may send so many bytes now."""
        now = self._now()
        self._whole_at = max(self._whole_at, now) + nbytes / CHATTER_BYTES_PER_SECOND
        return self._whole_at - now <= CHATTER_MAX_BYTES / CHATTER_BYTES_PER_SECOND
