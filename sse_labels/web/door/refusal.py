"""How a client is refused before aiohttp knows it: plain bytes on a plain socket.

Promises: the client gets an HTTP answer and a proper end of the connection, not a
reset; an `EventSource` gets one that lets it come back, and a WebSocket's handshake
gets none, for the same reason; a refused client costs a socket for a second and
nothing else.
Does not belong here: who is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from aiohttp import hdrs, web

from sse_labels.errors import RequestError
from sse_labels.protocol.sse import encode_error
from sse_labels.web.answers import SECURITY_HEADERS, error_response
from sse_labels.web.parameters import position_asked

#: How long a refused client may take to ask, and then to read its answer.
REFUSAL_SECONDS = 1.0
#: Read at once from a client whose request nobody needs.
READ_BYTES = 64 * 1024
#: Ends a request's head, and an answer's.
_HEAD_END = b"\r\n\r\n"


class Refusal:
    """One client that is told to come back later."""

    def __init__(
        self,
        raw: socket.socket,
        error: RequestError,
        busy_retry_ms: int,
        head: int | None,
        ended: Callable[[Refusal], None],
    ) -> None:
        """Own the socket `raw`; call `ended` when it is closed.

        `head` is where a client goes on that says no position; None: not known.
        """
        self._raw = raw
        self._error = error
        self._busy_retry_ms = busy_retry_ms
        self._head = head
        self._ended = ended
        self._asked = b""
        self._answered = False
        self._loop = asyncio.get_running_loop()
        raw.setblocking(False)
        self._loop.add_reader(raw, self._read)
        self._timer = self._loop.call_later(REFUSAL_SECONDS, self.end)

    def end(self) -> None:
        """Close; whoever has not asked to the end so far is answered first."""
        if not self._answered:
            self._answer()
        self._timer.cancel()
        self._loop.remove_reader(self._raw)
        self._raw.close()
        self._ended(self)

    def _read(self) -> None:
        # Read on after the answer, too: closing a socket with unread bytes in it sends a reset,
        # and that may overtake the answer.
        try:
            data = self._raw.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.end()
        elif not self._answered:
            self._asked += data
            # The position may stand in the last line, which comes in a segment of its own.
            if _HEAD_END in self._asked or len(self._asked) >= READ_BYTES:
                self._answer()

    def _answer(self) -> None:
        self._answered = True
        answer = encode_refusal(self._asked, self._error, self._busy_retry_ms, self._head)
        with contextlib.suppress(OSError):
            self._raw.send(answer)
            self._raw.shutdown(socket.SHUT_WR)


def refuse_at_once(
    raw: socket.socket, error: RequestError, busy_retry_ms: int, head: int | None
) -> None:
    """Answer and close, without waiting for anything, not even for what is asked."""
    with contextlib.suppress(OSError):
        raw.setblocking(False)
        asked = b""
        with contextlib.suppress(BlockingIOError):
            asked = raw.recv(READ_BYTES)
        raw.send(encode_refusal(asked, error, busy_retry_ms, head))
        raw.shutdown(socket.SHUT_WR)
    raw.close()


def encode_refusal(
    asked: bytes, error: RequestError, busy_retry_ms: int, head: int | None
) -> bytes:
    """Return what lets whoever sent `asked` come back later: a whole HTTP response, or nothing."""
    # The AT Protocol's own client takes every answer to its handshake for final, but not a
    # connection that breaks.
    if b"upgrade: websocket" in asked.lower():
        return b""
    # A browser takes any other status than 200 for final, and never comes back.
    if b"text/event-stream" in asked.lower():
        # Of half a head nobody knows the position: a wrong one would lose labels.
        position = position_asked(asked, head) if _HEAD_END in asked else None
        answer = encode_busy(error, busy_retry_ms, position)
    else:
        answer = encode_answer(error)
    return answer.partition(_HEAD_END)[0] + _HEAD_END if asked.startswith(b"HEAD ") else answer


def encode_answer(error: RequestError) -> bytes:
    """Return a whole HTTP response with the error, after which the connection closes."""
    return _encode(error_response(error))


def encode_busy(error: RequestError, retry_ms: int, position: int | None) -> bytes:
    """Return the same as an event stream that ends at once, for an `EventSource`."""
    event = encode_error(error.name, str(error), cursor=position, retry_ms=retry_ms)
    return _encode(web.Response(body=event, content_type="text/event-stream", charset="utf-8"))


def _encode(answer: web.Response) -> bytes:
    body = answer.text or ""
    headers = {
        hdrs.CONTENT_LENGTH: str(len(body)),
        hdrs.CACHE_CONTROL: "no-store",
        # Nothing in it is anybody's secret, and a page of any origin shall know what to do.
        hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*",
        **SECURITY_HEADERS,
        **answer.headers,
        hdrs.CONNECTION: "close",
    }
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", body]).encode("ascii")
