"""The subscribers: thousands of connections in one process that costs less than any server.

Promises: every event that arrives is counted, on every connection. A few sampled connections are
read in full: for latency, and to see that their events come in order, none twice, none missing.
Raw sockets and epoll; one buffer; the bytes of the others are looked at once, by a count in C.
"""

from __future__ import annotations

import array
import re
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks import cores, measure
from benchmarks.labels import EVENT, MARK
from benchmarks.worker import obey

BUFFER_BYTES = 1 << 18
#: 28,000 ports of one address is all that Linux gives by default, and some rest after use.
CLIENTS_PER_ADDRESS = 4_000
#: After the last event that is due: would more come than were published?
LINGER_SECONDS = 0.2
#: The end of a snapshot, with its seq.
COMPLETE = re.compile(rb'"name":"SnapshotComplete"[^\n]*"seq":(\d+)[^\d\n]')
#: An event may be cut by the end of a read; longer than any frame.
TAIL_BYTES = 4096


class Sample:
    """One connection that is read in full."""

    def __init__(self, latencies: array.array[int], gaps: bool) -> None:
        self._tail = b""
        self._latencies = latencies
        self._gaps = gaps
        self._id = self._number = -1
        self.wrong = 0

    def read(self, data: bytes) -> None:
        """Look at every event of what arrived just now."""
        now = time.monotonic_ns()
        data = self._tail + data
        end = 0
        for match in EVENT.finditer(data):
            end = match.end()
            text, published, number = match.group(1), int(match[2]), int(match[3])
            if published:
                self._latencies.append(now - published)
            expected = number > self._number if self._gaps else number == self._number + 1
            self.wrong += self._number >= 0 and not expected
            self._number = number
            if text.isdigit():
                self.wrong += int(text) <= self._id
                self._id = int(text)
        self._tail = data[end:][-TAIL_BYTES:]


class Snapshot:
    """One reader of a snapshot: when it was complete, as of which seq, and of what it consisted."""

    def __init__(self, whole: bool) -> None:
        """`whole`: the seqs of all its events are kept; that costs more than receiving them."""
        self._tail = b""
        self._seqs = array.array("q") if whole else None
        self.completed_ns = 0
        self.until = 0

    def read(self, data: bytes) -> None:
        """Look at what arrived just now, until the snapshot is complete."""
        if self.completed_ns:
            return
        now = time.monotonic_ns()
        data = self._tail + data
        end = 0
        if self._seqs is not None:
            for match in EVENT.finditer(data):
                end = match.end()
                self._seqs.append(int(match[1]))
        complete = COMPLETE.search(data)
        if complete is not None:
            self.completed_ns, self.until = now, int(complete[1])
        self._tail = data[end:][-TAIL_BYTES:]

    def found(self, began_ns: int) -> dict[str, Any]:
        """What there was, for the one who asks."""
        return {
            "seconds": (self.completed_ns - began_ns) / 1e9 if self.completed_ns else None,
            "until": self.until,
            "seqs": None if self._seqs is None else measure.digest(self._seqs),
        }


class Crowd:
    """All subscribers of one scenario."""

    def __init__(self) -> None:
        cores.raise_files()
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self.hang_up()

    def hang_up(self) -> dict[str, Any]:
        """Close all connections and forget them."""
        for connection in getattr(self, "_sockets", {}).values():
            # A reset: no port stays reserved behind it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._receive: dict[int, Callable[[bytearray], int]] = {}
        #: Connections whose bytes are looked at more closely.
        self._closely: dict[int, Callable[[bytes], None]] = {}
        self._heads: dict[int, bytes] = {}
        self._requests: dict[int, bytes] = {}
        self._samples: list[Sample] = []
        self._snapshots: list[Snapshot] = []
        self._counts: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._latencies = array.array("q")
        self._refused: Counter[str] = Counter()
        self._total = self._open = self._gone = self._bytes = 0
        self._last = self._began = 0
        self._used = 0.0
        return {}

    def connect(
        self,
        host: str,
        port: int,
        groups: list[dict[str, Any]],
        samples: int,
        seconds: float,
        per_address: int = CLIENTS_PER_ADDRESS,
    ) -> dict[str, Any]:
        """Open all connections at once; return when every one has its response head.

        Each group is a `count` of clients with one `request`, each of which is to get `events`
        (`gaps`: its filter hides some; `snapshot`: they are a snapshot, to be complete).
        `samples` clients, spread over all, are read in full, and so is the first snapshot.
        The clients of a group come from its `address`, if it names one.
        No address has more than `per_address` clients.
        """
        began = self._began = time.monotonic_ns()
        self._used = time.process_time()
        clients = [group for group in groups for _ in range(group["count"])]
        every = max(1, len(clients) // samples) if samples else len(clients) + 1
        for number, group in enumerate(clients):
            connection = socket.socket()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source = 1 + number // per_address
            address = group.get("address") or (f"127.0.0.{source}" if source > 1 else None)
            if address is not None:
                connection.setsockopt(
                    socket.SOL_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1
                )
                connection.bind((address, 0))
            connection.connect_ex((host, port))
            fd = connection.fileno()
            self._sockets[fd] = connection
            self._receive[fd] = connection.recv_into
            self._requests[fd] = group["request"].encode()
            self._counts[fd] = 0
            self._expected[fd] = group["events"]
            self._heads[fd] = b""
            if group.get("snapshot"):
                self._snapshots.append(Snapshot(whole=not self._snapshots))
                self._closely[fd] = self._head_of(fd, self._snapshots[-1])
            elif number % every == 0 and len(self._samples) < samples:
                self._samples.append(Sample(self._latencies, group.get("gaps", False)))
                self._closely[fd] = self._head_of(fd, self._samples[-1])
            else:
                self._closely[fd] = self._head_of(fd, None)
            self._epoll.register(fd, select.EPOLLOUT)
        deadline = began + int(seconds * 1e9)
        self._loop(lambda: self._open + self._gone >= len(clients), deadline)
        return {
            "connected": self._open,
            "refused": dict(self._refused),
            "seconds": (time.monotonic_ns() - began) / 1e9,
        }

    def receive(self, seconds: float, since_connect: bool = False) -> dict[str, Any]:
        """Read until every client has what it is to get, or `seconds` are over."""
        began = time.monotonic_ns()
        if not since_connect:
            self._began, self._used = began, time.process_time()
        expected = sum(self._expected.values())
        self._loop(
            lambda: self._total >= expected and all(each.completed_ns for each in self._snapshots),
            began + int(seconds * 1e9),
        )
        ended = time.monotonic_ns()
        load_cpu = (time.process_time() - self._used) / max(1, ended - self._began) * 1e9
        self._loop(lambda: False, ended + int(LINGER_SECONDS * 1e9))
        short = sum(self._counts[fd] < due for fd, due in self._expected.items())
        over = sum(self._counts[fd] > due for fd, due in self._expected.items())
        ordered = sorted(self._latencies)
        return {
            "expected": expected,
            "deliveries": self._total,
            "bytes": self._bytes,
            "clients_short": short,
            "clients_over": over,
            "clients_gone": self._gone,
            "samples": len(self._samples),
            "snapshots": [each.found(self._began) for each in self._snapshots],
            "samples_wrong": sum(sample.wrong for sample in self._samples),
            "began_ns": self._began,
            "last_ns": self._last,
            "latency_ms": {
                f"p{share}": measure.percentile(ordered, share / 100) / 1e6
                for share in (50, 95, 99)
            }
            if ordered
            else None,
            "load_cpu": load_cpu,
        }

    def _head_of(self, fd: int, sample: Sample | Snapshot | None) -> Callable[[bytes], None]:
        """What reads a response head, and after it hands the connection over."""

        def read(data: bytes) -> None:
            head, end, rest = (self._heads[fd] + data).partition(b"\r\n\r\n")
            if not end:
                self._heads[fd] = head
                return
            del self._heads[fd]
            status = head.partition(b"\r\n")[0].decode("latin-1")
            if " 200 " not in status:
                self._refused[status] += 1
                self._drop(fd)
                return
            self._open += 1
            if sample is None:
                del self._closely[fd]
            else:
                self._closely[fd] = sample.read
                sample.read(rest)

        return read

    def _drop(self, fd: int) -> None:
        if fd in self._heads:
            self._refused["closed before its answer"] += 1
            del self._heads[fd]
        self._gone += 1
        self._epoll.unregister(fd)
        self._sockets.pop(fd).close()
        del self._receive[fd]
        self._closely.pop(fd, None)

    def _loop(self, enough: Callable[[], bool], deadline: int) -> None:
        """Serve all connections until it is enough, or the deadline."""
        poll, clock = self._epoll.poll, time.monotonic_ns
        buffer, view, count = self._buffer, self._view, self._buffer.count
        receive, closely, counts = self._receive, self._closely, self._counts
        readable = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
        while not enough():
            left = deadline - clock()
            if left <= 0:
                return
            before = self._total
            for fd, event in poll(min(left / 1e9, 0.5), 4096):
                if event & readable:
                    try:
                        got = receive[fd](buffer)
                    except BlockingIOError:
                        continue
                    except OSError:
                        got = 0
                    if not got:
                        self._drop(fd)
                        continue
                    events = count(MARK, 0, got)
                    counts[fd] += events
                    self._total += events
                    self._bytes += got
                    if fd in closely:
                        closely[fd](bytes(view[:got]))
                elif event & select.EPOLLOUT:
                    try:
                        self._sockets[fd].send(self._requests.pop(fd))
                    except OSError:
                        self._drop(fd)
                        continue
                    self._epoll.modify(fd, select.EPOLLIN)
            if self._total != before:
                self._last = clock()


if __name__ == "__main__":
    crowd = Crowd()
    obey({"connect": crowd.connect, "receive": crowd.receive, "hang_up": crowd.hang_up})
