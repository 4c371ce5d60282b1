"""Refuses a client before aiohttp knows the connection, with plain bytes on a plain socket.

Promises: the client gets an HTTP answer and a normal end of the connection, not a reset. An
`EventSource` gets an answer after which it reconnects. A WebSocket handshake gets no answer,
because its client reconnects only then. A refused client costs one socket for one second.
Does not belong here: which client is refused (`guard`).
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

#: How long a refused client may take to send its request, and to read the answer.
REFUSAL_SECONDS = 1.0
#: The most bytes that are read at once from a refused client.
READ_BYTES = 64 * 1024
#: The end of the head, in a request and in an answer.
_HEAD_END = b"\r\n\r\n"


class Refusal:
    """One client that gets the answer to reconnect later."""

    def __init__(
        self,
        raw: socket.socket,
        error: RequestError,
        busy_retry_ms: int,
        head: int | None,
        ended: Callable[[Refusal], None],
    ) -> None:
        """Own the socket `raw`, and call `ended` when the socket is closed.

        `head` is where a client without a position continues. None means not known.
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
        """Close the socket. A client whose request is incomplete gets its answer first."""
        if not self._answered:
            self._answer()
        self._timer.cancel()
        self._loop.remove_reader(self._raw)
        self._raw.close()
        self._ended(self)

    def _read(self) -> None:
        # Continue to read after the answer: closing a socket with unread bytes sends a reset, and
        # the reset may overtake the answer.
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
            # The position may be in the last line, and that line may come in a later segment.
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
    """Answer and close without waiting, not even for the request."""
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
    """Return the bytes after which the sender of `asked` reconnects later.

    They are a complete HTTP response, or empty.
    """
    # The AT Protocol's own client treats every answer to its handshake as final. It reconnects
    # when the connection breaks.
    if b"upgrade: websocket" in asked.lower():
        return b""
    # A browser treats every status except 200 as final, and never reconnects.
    if b"text/event-stream" in asked.lower():
        # An incomplete head may lack the position. A wrong position would lose labels.
        position = position_asked(asked, head) if _HEAD_END in asked else None
        answer = encode_busy(error, busy_retry_ms, position)
    else:
        answer = encode_answer(error)
    return answer.partition(_HEAD_END)[0] + _HEAD_END if asked.startswith(b"HEAD ") else answer


def encode_answer(error: RequestError) -> bytes:
    """Return a complete HTTP response with the error. The connection closes after it."""
    return _encode(error_response(error))


def encode_busy(error: RequestError, retry_ms: int, position: int | None) -> bytes:
    """Return the error as an event stream that ends at once, for an `EventSource`."""
    event = encode_error(error.name, str(error), cursor=position, retry_ms=retry_ms)
    return _encode(web.Response(body=event, content_type="text/event-stream", charset="utf-8"))


def _encode(answer: web.Response) -> bytes:
    body = answer.text or ""
    headers = {
        hdrs.CONTENT_LENGTH: str(len(body)),
        hdrs.CACHE_CONTROL: "no-store",
        # The answer contains no secret. A page of any origin may read why it was refused.
        hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*",
        **SECURITY_HEADERS,
        **answer.headers,
        hdrs.CONNECTION: "close",
    }
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", body]).encode("ascii")
