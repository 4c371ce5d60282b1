"""One TCP connection: aiohttp's protocol, with limits on what its client may do.

Promises: an incomplete request, and an answer that the client does not read, end in bounded
time and hold bounded memory. Input that is not HTTP gets an answer in JSON. An open stream needs
no timer here, and ends here only when its client sends too much.
Does not belong here: the number of connections (`guard`), the meaning of a request.

aiohttp 3.14 has these gaps:
- Only `keepalive_timeout` bounds the time for a head. It must be longer than a proxy's time-out.
- A client that does not read its answer holds its connection forever.
- A client may send 32 heads of 800 kB in advance, and they wait behind a stream.
- aiohttp logs a traceback for each malformed request.
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

#: For one header line with its name, and for the request line. aiohttp's default, as in Apache
#: and nginx.
MAX_FIELD_BYTES = 8190
#: The most header lines of a request: Apache's default.
MAX_FIELDS = 100
#: For an incomplete head, and for heads that arrive while another request is handled.
MAX_HEAD_BYTES = 64 * 1024
#: How long the rest of an unwanted body is read, so that no reset overtakes the answer.
LINGERING_SECONDS = 2.0
#: How much a WebSocket client may send at once, and on average. A pong has at most 131 bytes.
CHATTER_MAX_BYTES = 32 * 1024
CHATTER_BYTES_PER_SECOND = 1024

#: The shortest time until a peer counts as dead: the kernel's first retransmission to a distant
#: peer takes one second.
DEAD_MIN_SECONDS = 1.0


class ClientConnection(Protocol):
    """aiohttp's protocol with limits."""

    __slots__ = (
        "_allowance", "_body", "_counted", "_handling", "_kept_transport", "_key", "_tail",
        "_terms", "_unread",
    )  # fmt: skip

    def __init__(
        self, terms: Terms, key: str | None, server: web.Server, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Call `terms.ended` with `key` once, at the end of the connection."""
        super().__init__(server, loop, terms.options)
        self._terms = terms
        self._key = key
        self._counted = True
        #: aiohttp drops its transport while closing. The transport stays open until the client
        #: has read everything.
        self._kept_transport: asyncio.Transport | None = None
        #: Whether a handler runs, and the body of the newest request.
        self._handling = False
        self._body: StreamReader | None = None
        #: Bytes received since the last complete head.
        self._unread = 0
        #: How much a WebSocket client may send. None: the connection is not a WebSocket.
        self._allowance: Allowance | None = None
        #: The last bytes of an incomplete head. None: the head is complete.
        self._tail: bytes | None = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first head."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what asyncio gives for TCP
        self._kept_transport = transport
        self._terms.heads.start(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop all waits, and stop counting the connection."""
        self._terms.heads.stop(self)
        self._terms.answers.stop(self)
        self._kept_transport = None
        self.release()
        super().connection_lost(exc)

    def release(self) -> None:
        """Stop counting this connection."""
        if self._counted:
            self._counted = False
            self._terms.ended(self._key)

    def data_received(self, data: bytes) -> None:
        """Pass the bytes to aiohttp, unless they exceed a limit."""
        # aiohttp itself calls this method without bytes, to continue after a pause.
        if not data or self._admit(data):
            super().data_received(data)

    def _admit(self, data: bytes) -> bool:
        if self._allowance is not None:
            if self._allowance.take(len(data)):
                return True
            # A million empty frames per second delayed all other clients by 70 ms, pings by 700.
            return self._cut_off("a connection is cut, its client sends too much")
        if self._body is not None and not self._body.is_eof():
            # aiohttp reads a body at the handler's pace, and drops it after an early answer.
            return True
        if not self._unread and not self._handling:
            self._terms.heads.start(self)
        self._unread += len(data)
        if self._handling:
            if self._unread <= MAX_HEAD_BYTES:
                return True
            # The client sends more requests before the answer. No reader of labels does that.
            return self._cut_off("a connection is cut, its client sends too much")
        if self._tail is not None:
            # Empty lines before a request count as bytes, but do not end its head
            # (RFC 9112, 2.2).
            seen = (self._tail + data) if self._tail else data.lstrip(b"\r\n")
            self._tail = None if b"\r\n\r\n" in seen else seen[-3:]
            if self._tail is not None and self._unread > MAX_HEAD_BYTES:
                self._answer(HeadTooLarge(f"expected a head of at most {MAX_HEAD_BYTES} bytes"))
                return False
        return True

    def request_began(self, body: StreamReader) -> None:
        """Stop the limits on time: the head is complete, and the handler runs next."""
        self._terms.heads.stop(self)
        self._terms.answers.stop(self)
        self._handling = True
        self._body = body
        self._unread = 0
        self._tail = b""

    def upgraded(self) -> None:
        """Limit all further input as that of a WebSocket client, which sends little."""
        self._allowance = Allowance()

    def answer_began(self) -> None:
        """Start the time within which the client reads the answer, or sends the next request."""
        self._handling = False
        if self._kept_transport is not None:
            self._terms.answers.start(self)
            if self._unread:
                self._terms.heads.start(self)

    def head_is_late(self) -> None:
        """Answer 408, or end a connection whose client never sent anything."""
        if self._kept_transport is None:
            return
        if self._kept_transport.is_closing() or self._kept_transport.get_write_buffer_size():
            self.cut()
        elif self._unread:
            seconds = self._terms.heads.seconds
            self._answer(RequestTimeout(f"expected the whole head within {seconds:g} s"))
        else:
            self.force_close()

    def answer_is_late(self) -> None:
        """End a connection whose client does not read."""
        self._cut_off("a connection is cut, its client does not read")

    def _cut_off(self, sentence: str) -> bool:
        log.info(sentence, extra=caused_by(self._address(), peer=self.peername))
        self.cut()
        return False

    def _address(self) -> str:
        # The name of a Unix socket is a string, and often empty.
        return str(self.peername[0]) if isinstance(self.peername, tuple) else ""

    def cut(self) -> None:
        """End the connection at once, whether its client reads or not."""
        if self._kept_transport is not None:
            reset(self._kept_transport)

    def _answer(self, error: RequestError) -> None:
        """Answer between two requests, when no handler writes, and close."""
        self._terms.refused(error)
        if self._kept_transport is not None:
            self._kept_transport.write(encode_answer(error))
        self.force_close()

    def answer_to_no_request(self, error: BaseException | None) -> web.Response:
        """Return the answer to bytes that are not a request.

        The answer does not repeat these bytes: an attacker could choose them.
        """
        refused: RequestError
        if isinstance(error, LineTooLong):
            refused = HeadTooLarge(f"expected lines of at most {MAX_FIELD_BYTES} bytes")
        elif isinstance(error, ContentEncodingError):
            # aiohttp knows the coding's name, but needs another package to decode the body.
            refused = UnsupportedMediaType("expected a body in gzip or deflate, or as it is")
        else:
            refused = InvalidRequest(
                f"expected a request in HTTP/1.1 or HTTP/1.0 with at most {MAX_FIELDS} header lines"
            )
        # The error's class only: the error's text repeats the input, which may contain a token.
        log.debug(
            "not a request",
            extra=caused_by(self._address(), peer=self.peername, error=type(error).__name__),
        )
        self._terms.refused(refused)
        response = error_response(refused)
        response.headers.update(SECURITY_HEADERS)
        # The server cannot tell where the next request begins.
        response.headers[hdrs.CONNECTION] = "close"
        return response


def reset(transport: asyncio.WriteTransport) -> None:
    """Reset the connection. The kernel frees its memory, and the client sees a close.

    After a plain abort the kernel would keep the unread bytes for a client that does not read.
    """
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def end_dead_peers(
    listener: socket.socket, *, quiet_seconds: float, unanswered_seconds: float
) -> None:
    """Let the kernel end accepted connections whose peer does not answer any more (tcp(7)).

    Otherwise a vanished peer is noticed only when the send buffer is full. With heartbeats alone
    that takes hours. Sent bytes wait at most `unanswered_seconds` for their acknowledgement. After
    `quiet_seconds` without sent bytes, the kernel probes the peer. A receive window that stays
    closed for `unanswered_seconds` counts as no answer (Linux 5.11).
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        limit = max(DEAD_MIN_SECONDS, unanswered_seconds)
        options = {
            socket.TCP_USER_TIMEOUT: round(1000 * limit),
            # Later than a heartbeat, so that streams cause no probes.
            socket.TCP_KEEPIDLE: int(quiet_seconds) + 1,
            socket.TCP_KEEPINTVL: max(1, int(limit / 3)),
        }
        for option, value in options.items():
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


class Terms:
    """The limits and callbacks that all connections share."""

    def __init__(
        self,
        *,
        request_seconds: float,
        keepalive_seconds: float,
        refused: Callable[[RequestError], None],
        ended: Callable[[str | None], None],
    ) -> None:
        #: The options of aiohttp's protocol.
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
        #: Counted from the begin of the connection, or from the first byte of a later head.
        self.heads = Deadlines(request_seconds, ClientConnection.head_is_late)
        #: Counted from the end of a handler. aiohttp itself ends idle connections after
        #: `keepalive_seconds`. The connections left after that have clients that do not read.
        self.answers = Deadlines(
            keepalive_seconds + request_seconds, ClientConnection.answer_is_late
        )


class Deadlines:
    """Connections that must do something within the same time. All share one timer."""

    def __init__(self, seconds: float, late: Callable[[ClientConnection], None]) -> None:
        self.seconds = seconds
        self._late = late
        # Every entry waits equally long, so entries expire in the order of their insertion.
        self._due: dict[ClientConnection, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return how many connections have a deadline."""
        return len(self._due)

    def start(self, connection: ClientConnection) -> None:
        """Set a deadline for `connection`. An earlier deadline stays."""
        loop = asyncio.get_running_loop()
        self._due.setdefault(connection, loop.time() + self.seconds)
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._sweep, loop)

    def stop(self, connection: ClientConnection) -> None:
        """Remove the deadline."""
        self._due.pop(connection, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        late = [one for one, when in takewhile(lambda due: due[1] <= now, self._due.items())]
        for connection in late:
            del self._due[connection]
        if self._due:
            # One timer for many deadlines: a delay of a tenth does no harm.
            when = max(next(iter(self._due.values())), now + self.seconds / 10)
            self._timer = loop.call_at(when, self._sweep, loop)
        for connection in late:
            self._late(connection)


class Allowance:
    """How much a consumer may send over a WebSocket: pongs, a few pings, a close."""

    __slots__ = ("_full_at", "_now")

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        #: When the consumer may send `CHATTER_MAX_BYTES` at once again.
        self._full_at = now()

    def take(self, nbytes: int) -> bool:
        """Return whether the consumer may send `nbytes` now."""
        now = self._now()
        self._full_at = max(self._full_at, now) + nbytes / CHATTER_BYTES_PER_SECOND
        return self._full_at - now <= CHATTER_MAX_BYTES / CHATTER_BYTES_PER_SECOND
