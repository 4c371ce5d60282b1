"""The guard decides which TCP connections are accepted.

Promises: the number of connections never exceeds the limits, in total and per address, so
clients alone cannot use up the file descriptors. A client over a limit gets an HTTP answer
that says so. If file descriptors run out anyway, new clients get an answer too, and open
connections continue.
Does not belong here: what an accepted connection does (`connection`).

The guard replaces aiohttp's site, because aiohttp 3.14 has no limit of connections. asyncio
accepts as many connections at once as the backlog holds, and asks nothing before. Without free
descriptors asyncio logs a traceback for each place in the backlog, again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from sse_labels.errors import RequestError, TooManyConnections, TooManyFromAddress
from sse_labels.metrics import Metrics
from sse_labels.web.addresses import PerAddress, caused_by
from sse_labels.web.door.aiohttp_seams import report_requests
from sse_labels.web.door.connection import ClientConnection, Terms
from sse_labels.web.door.refusal import Refusal, refuse_at_once
from sse_labels.web.neighbours import Neighbours

log = logging.getLogger(__name__)

#: Connections accepted before the event loop does other work: a flood of new connections must
#: not delay the streams.
ACCEPTS_AT_ONCE = 64
#: Refused clients that the server waits for at the same time, until they have read their answer.
MAX_REFUSALS = 256
#: The wait until the next try when nothing can be accepted. asyncio waits equally long.
ACCEPT_PAUSE_SECONDS = 1.0
#: A worker with more connections pauses this long, so that a worker with fewer can accept. The
#: pause is longer than a busy worker's round of accepting, which takes about 20 ms. Measured with
#: 509 clients that reconnected to a new worker: it got 235 with 5 ms, and all with 30 ms.
YIELD_SECONDS = 0.03
#: Descriptors beside connections, pools and refusals: files, name look-ups, and the kept ones.
SPARE_DESCRIPTORS = 32
#: Descriptors kept in reserve. The guard frees one to refuse a client when no other is left.
KEPT_DESCRIPTORS = 8

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Guard:
    """Counts connections, and accepts or refuses each one."""

    def __init__(
        self,
        metrics: Metrics,
        per_address: PerAddress,
        *,
        max_connections: int,
        request_seconds: float,
        keepalive_seconds: float,
        busy_retry_ms: Callable[[], int],
        head: Callable[[], int | None],
        neighbours: Neighbours,
        streams_full: Callable[[], bool],
    ) -> None:
        """Accept nothing before `serving`.

        `busy_retry_ms` returns how long a refused `EventSource` waits. `head` returns where a
        refused client continues when it sends no position. `neighbours` accept from the same
        sockets.
        """
        self.open = 0
        self._accepting = False
        self._neighbours = neighbours
        self._streams_full = streams_full
        self.per_address = per_address
        self.terms = Terms(
            request_seconds=request_seconds,
            keepalive_seconds=keepalive_seconds,
            refused=self._count_refused,
            ended=self.give_back,
        )
        self._metrics = metrics
        self._max_connections = max_connections
        self._busy_retry_ms = busy_retry_ms
        self._head = head
        self._refusals: set[Refusal] = set()
        self._kept: list[socket.socket] = []
        self._next_log_at = 0.0
        metrics.gauges["connections"] = lambda: self.open
        metrics.gauges["connections_limit"] = lambda: max_connections

    @contextlib.asynccontextmanager
    async def serving(
        self, server: web.Server, listeners: Sequence[socket.socket]
    ) -> AsyncIterator[None]:
        """Accept from `listeners`, which already listen, and pass connections to `server`.

        After the block nothing more is accepted. `server` ends the open connections.
        """
        loop = asyncio.get_running_loop()
        report_requests(server)
        self._keep_descriptors()
        acceptors = [Acceptor(self, server, listener) for listener in listeners]
        try:
            for acceptor in acceptors:
                acceptor.open(loop)
            self._accepting = True
            self._count(0)
            yield
        finally:
            self._accepting = False
            self._count(0)
            for acceptor in acceptors:
                await acceptor.close(loop)
            for refusal in tuple(self._refusals):
                refusal.end()
            for kept in self._kept:
                kept.close()

    def take(self, address: str) -> str | None:
        """Count a new connection; raise TooManyConnections or TooManyFromAddress."""
        if self.open >= self._max_connections:
            raise TooManyConnections(f"{self._max_connections} connections are open, the most here")
        key = self.per_address.take(address)
        self._count(1)
        return key

    def yields(self) -> bool:
        """Return whether another worker with fewer connections should accept the next one."""
        full = self.open >= self._max_connections or self._streams_full()
        return self._neighbours.yields(full=full)

    def others_accept(self) -> None:
        """Note that the connection for which this worker paused was accepted by another one."""
        self._neighbours.accepted()

    def give_back(self, key: str | None) -> None:
        """Stop counting a connection that ended."""
        self._count(-1)
        self.per_address.give_back(key)

    def _count(self, more: int) -> None:
        self.open += more
        self._neighbours.hold(self.open if self._accepting else None)

    def refuse(self, raw: socket.socket, error: RequestError) -> None:
        """Answer a connection over the limit, and end it."""
        self._count_refused(error)
        # Without a kept descriptor, this socket holds the last one. The next client needs it.
        if len(self._refusals) < MAX_REFUSALS and self._kept:
            self._refusals.add(
                Refusal(raw, error, self._busy_retry_ms(), self._head(), self._refused)
            )
        else:
            refuse_at_once(raw, error, self._busy_retry_ms(), self._head())

    def refuse_without_descriptor(self, listener: socket.socket) -> None:
        """Answer one client although no descriptor is left. Raises OSError as `accept` does.

        Without this, clients would wait in the backlog without an answer.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._next_log_at:
            self._next_log_at = now + ACCEPT_PAUSE_SECONDS
            log.error("out of file descriptors", extra={"connections": self.open})
        if self._kept:
            self._kept.pop().close()
        try:
            raw, _ = listener.accept()
            self.refuse(
                raw, TooManyConnections("no file descriptor is left for another connection")
            )
        finally:
            self._keep_descriptors()

    def _refused(self, refusal: Refusal) -> None:
        self._refusals.discard(refusal)
        self._keep_descriptors()

    def _keep_descriptors(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._kept) < KEPT_DESCRIPTORS:
                self._kept.append(socket.socket())

    def _count_refused(self, error: RequestError) -> None:
        self._metrics.requests_refused[error.name] += 1


class Acceptor:
    """Accepts connections from one listening socket."""

    def __init__(self, guard: Guard, server: web.Server, listener: socket.socket) -> None:
        self._guard = guard
        self._server = server
        self._listener = listener
        self._pause: asyncio.TimerHandle | None = None
        #: Tasks that give each accepted connection its protocol.
        self._handing_over: set[asyncio.Task[None]] = set()

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start to accept."""
        self._pause = None
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept, loop)

    async def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop accepting. Wait until each accepted connection has its protocol."""
        loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()
        # Before the drain: a client that connects meanwhile is refused, or reaches a neighbour.
        self._listener.close()
        await asyncio.gather(*self._handing_over)

    def _accept(self, loop: asyncio.AbstractEventLoop, paused: bool = False) -> None:
        for accepted in range(ACCEPTS_AT_ONCE):
            if self._guard.yields():
                self._pause_accepting(loop, YIELD_SECONDS)
                return
            try:
                self._accept_one(loop)
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                if paused and not accepted:
                    self._guard.others_accept()
                return
            except OSError as error:
                log.error("nothing is accepted for a while", extra={"error": error})
                self._pause_accepting(loop, ACCEPT_PAUSE_SECONDS)
                return

    def _pause_accepting(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        loop.remove_reader(self._listener)
        self._pause = loop.call_later(seconds, self._resume, loop)

    def _resume(self, loop: asyncio.AbstractEventLoop) -> None:
        self.open(loop)
        self._accept(loop, paused=True)

    def _accept_one(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            raw, address = self._listener.accept()
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                raise
            self._guard.refuse_without_descriptor(self._listener)
            return
        try:
            key = self._guard.take(address[0] if address else "")
        except (TooManyConnections, TooManyFromAddress) as error:
            self._guard.refuse(raw, error)
        else:
            connection = ClientConnection(self._guard.terms, key, self._server, loop)
            task = loop.create_task(self._hand_over(loop, raw, connection, address))
            self._handing_over.add(task)
            task.add_done_callback(self._handing_over.discard)

    async def _hand_over(
        self,
        loop: asyncio.AbstractEventLoop,
        raw: socket.socket,
        connection: ClientConnection,
        address: Any,
    ) -> None:
        raw.setblocking(False)
        try:
            await loop.connect_accepted_socket(lambda: connection, raw)
        except Exception as error:
            # The error concerns one client only.
            peer = address[0] if address else ""
            log.warning(
                "a connection could not be taken over",
                extra=caused_by(peer, error=repr(error)),
            )
            raw.close()
            connection.release()
        except BaseException:
            connection.release()
            raise


def most_connections(wanted: int, others: int) -> int:
    """Return how many connections fit into the limit of open files, at most `wanted`.

    `others` is the number of descriptors for other uses, mostly connections to the database.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    free = limit - _open_descriptors() - others - SPARE_DESCRIPTORS
    # With few descriptors, refusals get a quarter of them. A client beyond that is refused at once.
    fit = max(1, free - min(MAX_REFUSALS, free // 4))
    if fit < wanted:
        log.warning(
            "fewer files may be open than connections are allowed",
            extra={"files": limit, "max_connections": wanted, "allowed": fit},
        )
    return min(wanted, fit)


def descriptors_needed(connections: int, others: int) -> int:
    """Return the limit of open files at which `most_connections` allows all `connections`."""
    refusals = min(MAX_REFUSALS, math.ceil(connections / 3))
    # Twice: once to spare, and once for the files that are open before the first connection.
    return connections + refusals + others + 2 * SPARE_DESCRIPTORS


def _open_descriptors() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return SPARE_DESCRIPTORS
