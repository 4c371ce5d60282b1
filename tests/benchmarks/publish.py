"""The publishers: one process that publishes in the way that is natural for each server.

The service gets SQL INSERTs into its table, each statement a transaction of its own; the peers in
Python a POST whose body holds one `data` a line; Nchan one POST for each message, for it takes no
batches, pipelined on one connection. The time of publishing is taken right before.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

import psycopg2
from psycopg2.extras import execute_values

from benchmarks import labels, measure
from benchmarks.worker import obey


class Target(Protocol):
    """Where to publish."""

    def publish(self, numbers: range) -> None:
        """Publish these events, in order; return when they are accepted."""

    def close(self) -> None:
        """Hang up."""


class Sql:
    """The service's table."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg2.connect(dsn)
        self._connection.autocommit = True
        self._cursor = self._connection.cursor()

    def publish(self, numbers: range) -> None:
        now = time.monotonic_ns()
        rows = [labels.row(now, number) for number in numbers]
        statement = f"INSERT INTO label ({labels.COLUMNS}) VALUES %s"
        execute_values(self._cursor, statement, rows, page_size=len(rows))

    def close(self) -> None:
        self._connection.close()


class Post:
    """A peer that takes a batch in one POST."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: "
        self._http = Http(host, port)

    def publish(self, numbers: range) -> None:
        now = time.monotonic_ns()
        body = "\n".join(labels.data(now, number) for number in numbers)
        self._http.send(f"{self._head}{len(body)}\r\n\r\n{body}".encode())
        self._http.finish()

    def close(self) -> None:
        self._http.close()


class Pipelined(Post):
    """A peer that takes one message in one POST; at most `pipeline` wait for their answer."""

    def __init__(self, host: str, port: int, path: str, pipeline: int) -> None:
        super().__init__(host, port, path)
        self._pipeline = pipeline

    def publish(self, numbers: range) -> None:
        for number in numbers:
            body = labels.data(time.monotonic_ns(), number)
            self._http.send(f"{self._head}{len(body)}\r\n\r\n{body}".encode())
            if self._http.waiting >= self._pipeline:
                self._http.take()
        self._http.finish()


class Http:
    """One connection that counts answers."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.waiting = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, request: bytes) -> None:
        self._socket.sendall(request)
        self.waiting += 1

    def take(self) -> list[bytes]:
        """Wait for bytes; return the bodies of the answers that are complete now."""
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed a publisher's connection")
        self._buffer += data
        bodies = []
        while True:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                break
            length = next(
                int(line[15:])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            )
            if len(rest) < length:
                break
            if not head.startswith(b"HTTP/1.1 20"):
                raise ConnectionError(f"refused: {head[:60]!r} {rest[:length]!r}")
            bodies.append(rest[:length])
            self._buffer = rest[length:]
            self.waiting -= 1
        return bodies

    def finish(self) -> None:
        """Wait for all answers."""
        while self.waiting:
            self.take()

    def close(self) -> None:
        self._socket.close()


class Publisher:
    """What this process can be told to do."""

    def __init__(self) -> None:
        self._target: Target | None = None

    def target(self, kind: str, **where: Any) -> dict[str, Any]:
        """Connect to where all that follows is published."""
        if self._target is not None:
            self._target.close()
        kinds: dict[str, Callable[..., Target]] = {"sql": Sql, "post": Post, "nchan": Pipelined}
        self._target = kinds[kind](**where)
        return {}

    def leave(self) -> dict[str, Any]:
        """Hang up."""
        if self._target is not None:
            self._target.close()
        self._target = None
        return {}

    def pace(self, first: int, count: int, rate: float) -> dict[str, Any]:
        """Publish `rate` events a second, one by one; those that are late go together."""
        assert self._target is not None
        began = time.monotonic_ns()
        done, requests, latest = 0, 0, 0.0
        while done < count:
            passed = (time.monotonic_ns() - began) / 1e9
            due = min(count, int(passed * rate) + 1)
            if due <= done:
                time.sleep(done / rate - passed)
                continue
            latest = max(latest, passed - done / rate)
            self._target.publish(range(first + done, first + due))
            done = due
            requests += 1
        return _published(began, count, requests, latest_ms=latest * 1e3)

    def burst(self, first: int, count: int, batch: int) -> dict[str, Any]:
        """Publish as fast as it goes, `batch` events at once."""
        assert self._target is not None
        began = time.monotonic_ns()
        for start in range(first, first + count, batch):
            self._target.publish(range(start, min(start + batch, first + count)))
        return _published(began, count, -(-count // batch))

    def hammer(
        self, host: str, port: int, request: str, publishers: int, batch: int, seconds: float
    ) -> dict[str, Any]:
        """Each publisher sends the next request when it has the answer, for `seconds`."""
        whole = request.encode()
        idle = [Http(host, port) for _ in range(publishers)]
        by_fd = {http.fileno(): http for http in idle}
        poll = select.epoll()
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        sent: dict[int, int] = {}
        latencies: list[float] = []
        seqs: set[int] = set()
        accepted = 0
        began = time.monotonic_ns()
        ends = began + int(seconds * 1e9)
        for fd, http in by_fd.items():
            sent[fd] = time.monotonic_ns()
            http.send(whole)
        while sent:
            for fd, _ in poll.poll(10):
                bodies = by_fd[fd].take()
                if not bodies:
                    continue
                now = time.monotonic_ns()
                latencies.append((now - sent.pop(fd)) / 1e6)
                accepted += batch
                if bodies[0].startswith(b'{"seqs"'):
                    seqs.update(json.loads(bodies[0])["seqs"])
                if now < ends:
                    sent[fd] = now
                    by_fd[fd].send(whole)
        for http in idle:
            http.close()
        latencies.sort()
        return {
            **_published(began, accepted, len(latencies)),
            "seqs": len(seqs),
            "answer_ms": {
                f"p{share}": measure.percentile(latencies, share / 100) for share in (50, 95, 99)
            },
        }


def _published(began: int, count: int, requests: int, **more: Any) -> dict[str, Any]:
    ended = time.monotonic_ns()
    return {"began_ns": began, "ended_ns": ended, "count": count, "requests": requests, **more}


if __name__ == "__main__":
    publisher = Publisher()
    obey(
        {
            "target": publisher.target,
            "leave": publisher.leave,
            "pace": publisher.pace,
            "burst": publisher.burst,
            "hammer": publisher.hammer,
        }
    )
