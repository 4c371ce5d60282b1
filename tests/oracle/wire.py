"""A second reader of the wire, on purpose: HTTP/1.1 and event streams over raw sockets.

It is stricter than a library. A wrong chunk size, a body that stops before its last chunk, and a
line that no standard knows are errors.

Sources: RFC 9112, section 7.1 (chunked); HTML standard, section 9.2.6 (interpreting a stream).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlencode

_LINE_END = re.compile(rb"\r\n|\n|\r")
READ_BYTES = 65536


class WireError(Exception):
    """The received bytes break a standard."""


class Event(NamedTuple):
    """A dispatched event: its type, the last event id at that moment, its data."""

    kind: str
    last_id: str
    data: str


class EventStream:
    """Interprets an event stream; its pieces may be cut anywhere."""

    def __init__(self, last_id: str = "") -> None:
        #: The id for a reconnect; it changes at the empty line that ends a block.
        self.last_id = last_id
        self.retry_ms: int | None = None
        self.comments = 0
        #: Blocks without data: they change the last id and dispatch nothing.
        self.silent_blocks = 0
        #: The start of the stream: the id of a block before any message.
        self.opened_at = ""
        self._messages = 0
        self._rest = b""
        self._id = last_id
        self._kind = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[Event]:
        """Take the next piece; return the events that it completes."""
        self._rest += piece
        events: list[Event] = []
        done = 0
        while (end := _LINE_END.search(self._rest, done)) is not None:
            if end.group() == b"\r" and end.end() == len(self._rest):
                break  # Perhaps the first half of CR LF.
            line = self._rest[done : end.start()].decode("utf-8")
            done = end.end()
            if line:
                self._take(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        self._rest = self._rest[done:]
        return events

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments += 1
        elif name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id":
            if not (value.isascii() and value.isdigit()):
                raise WireError(f"an id that is no seq: {line!r}")
            self._id = value
        elif name == "retry":
            if not (value.isascii() and value.isdigit()):
                raise WireError(f"a retry that is no number: {line!r}")
            self.retry_ms = int(value)
        else:
            raise WireError(f"a line that means nothing: {line!r}")

    def _dispatch(self) -> Event | None:
        self.last_id = self._id
        kind, data = self._kind or "message", self._data
        self._kind, self._data = "", []
        if not self._messages and kind != "message":
            self.opened_at = self.opened_at or self.last_id
        if not data:
            self.silent_blocks += 1
            return None
        self._messages += kind == "message"
        return Event(kind, self.last_id, "\n".join(data))


class Chunked:
    """Removes the framing of HTTP's chunked coding."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._left = 0
        self._after_data = False

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece; return the body's bytes in it."""
        self._rest += piece
        body: list[bytes] = []
        while not self.ended:
            if self._left:
                part = self._rest[: self._left]
                if not part:
                    break
                body.append(part)
                self._rest = self._rest[len(part) :]
                self._left -= len(part)
                self._after_data = self._left == 0
                continue
            line, found, rest = self._rest.partition(b"\r\n")
            if not found:
                break
            if self._after_data:
                if line:
                    raise WireError(f"a chunk is longer than it said: {line[:40]!r}")
                self._rest, self._after_data = rest, False
                continue
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", line):
                raise WireError(f"not a chunk size: {line[:40]!r}")
            if (size := int(line, 16)) == 0:
                if not rest.startswith(b"\r\n"):
                    if len(rest) >= 2:
                        raise WireError("trailers were not asked for")
                    break
                self.ended = True
            self._rest, self._left = rest, size
        return b"".join(body)


class Reply:
    """An HTTP answer whose head has been read."""

    def __init__(self, sock: socket.socket, status: int, headers: dict[str, str], rest: bytes):
        self.sock = sock
        self.status = status
        self.headers = headers
        self._rest = rest

    async def body(self, read_bytes: int = READ_BYTES) -> AsyncIterator[bytes]:
        """Yield the body in pieces; raise ConnectionError when it stops before its end."""
        loop = asyncio.get_running_loop()
        chunked = Chunked() if self.headers.get("transfer-encoding") == "chunked" else None
        length = self.headers.get("content-length")
        left = int(length) if length is not None else None
        piece = self._rest
        while True:
            if chunked is not None:
                if piece and (part := chunked.feed(piece)):
                    yield part
                if chunked.ended:
                    return
            else:
                if piece:
                    yield piece
                if left is not None:
                    left -= len(piece)
                    if left <= 0:
                        return
            piece = await loop.sock_recv(self.sock, read_bytes)
            if not piece:
                if chunked is None and left is None:
                    return
                raise ConnectionResetError("the body stops before its end")


@asynccontextmanager
async def exchange(
    port: int,
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes | None = None,
    *,
    receive_buffer: int | None = None,
) -> AsyncIterator[Reply]:
    """Send one request on a new connection, which is closed after the block."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    try:
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "", ""]).encode("ascii")
        await loop.sock_sendall(sock, head + (body or b""))
        received = b""
        while b"\r\n\r\n" not in received:
            piece = await loop.sock_recv(sock, 4096)
            if not piece:
                raise ConnectionResetError("no answer")
            received += piece
        first, _, rest = received.partition(b"\r\n\r\n")
        status_line, *fields = first.decode("ascii").split("\r\n")
        parsed = {}
        for field in fields:
            name, _, value = field.partition(":")
            parsed[name.lower()] = value.strip()
        yield Reply(sock, int(status_line.split()[1]), parsed, rest)
    finally:
        sock.close()


async def get(port: int, target: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a GET."""
    async with asyncio.timeout(15), exchange(port, "GET", target) as reply:
        pieces = [piece async for piece in reply.body()]
        return reply.status, reply.headers, b"".join(pieces)


async def post_labels(
    port: int, token: str, labels: list[dict[str, Any]], key: str | None = None
) -> tuple[int, Any]:
    """Status and JSON of one POST /labels."""
    headers = [("Authorization", f"Bearer {token}"), ("Content-Type", "application/json")]
    if key is not None:
        headers.append(("Idempotency-Key", key))
    body = json.dumps({"labels": labels}).encode()
    async with asyncio.timeout(15), exchange(port, "POST", "/labels", headers, body) as reply:
        pieces = [piece async for piece in reply.body()]
        return reply.status, json.loads(b"".join(pieces))


async def until_so(
    asked: Callable[[], Awaitable[bool]], seconds: float = 30.0, every_seconds: float = 0.02
) -> None:
    """Ask over the wire until the answer is yes; TimeoutError when it stays no."""
    async with asyncio.timeout(seconds):
        while not await asked():  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(every_seconds)


async def metric(port: int, name: str) -> float:
    """One number of /metrics."""
    _, _, body = await get(port, "/metrics")
    for line in body.decode().splitlines():
        with contextlib.suppress(ValueError):
            key, value = line.split(" ")
            if key == name:
                return float(value)
    raise WireError(f"/metrics has no {name}")


def stream_target(parameters: Iterable[tuple[str, str]]) -> str:
    """The path of a stream with its query."""
    query = urlencode(list(parameters))
    return f"/stream?{query}" if query else "/stream"


class Flood:
    """Clients that open connections and keep them, until the server refuses more.

    Every second client is an `EventSource`. Each must get the answer to its request, or
    TooManyConnections and the end of its connection.
    """

    def __init__(self, port: int) -> None:
        self.refused = 0
        #: Wrong answers, and connections without an answer.
        self.complaints: list[str] = []
        self._port = port
        self._held = contextlib.AsyncExitStack()
        self._number = 0

    async def __aenter__(self) -> Flood:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open_until_refused(self, enough: int = 10) -> None:
        """Open connections until `enough` in a row are refused."""
        in_a_row = 0
        while in_a_row < enough:
            in_a_row = in_a_row + 1 if await self._refused() else 0

    async def close(self) -> None:
        """Close all connections."""
        await self._held.aclose()

    async def _refused(self) -> bool:
        self._number += 1
        browser = self._number % 2 == 0
        headers = [("Accept", "text/event-stream")] if browser else []
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(10):
                    reply = await stack.enter_async_context(
                        exchange(self._port, "GET", "/health/live", headers)
                    )
                    body = b"".join([piece async for piece in reply.body()])
            except (OSError, TimeoutError) as error:
                self.complaints.append(f"connection {self._number}: {error!r}")
                return True
            if b'"TooManyConnections"' not in body:
                self._held.push_async_exit(stack.pop_all())
                if reply.status != 200:
                    self.complaints.append(f"connection {self._number}: {reply.status} {body!r}")
                return False
        self.refused += 1
        # After any status but 200 an EventSource never reconnects.
        if reply.status != (200 if browser else 503) or reply.headers["connection"] != "close":
            self.complaints.append(f"connection {self._number}: {reply.status} {reply.headers}")
        return True
