"""Reads: a limited number of reads at a time, each shared, with clients taking turns.

Promises: at most `max_reads` reads run at a time. Callers that need the same read share one.
A client that asks alone may use all of the reads. When several clients ask, each has one read at a
time, and the next turn goes to the client that has used the least time. So a client with 900
streams gets as much as a client with one.
A caller that leaves does not cancel a running read: aiopg closes the connection of a cancelled
query. A read that no caller waits for any more does not start.
Memory: one entry for each read that a caller waits for.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeVar, cast

T = TypeVar("T")

#: A client keeps its share for this time after its last read. A backfill asks for its next page
#: only after it has written the previous one.
IDLE_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Client:
    """One client: the reads that it waits for, in order, and the time that it has used."""

    name: str
    waiting: dict[Read, None] = field(default_factory=dict)
    running: int = 0
    #: Seconds that its reads took, counted from an origin that all clients have in common.
    used: float = 0.0
    queued: bool = False


@dataclass(eq=False, slots=True)
class Read:
    """One read, and the clients that wait for it."""

    key: Hashable
    work: Callable[[], Coroutine[Any, Any, Any]]
    result: asyncio.Future[Any]
    askers: Counter[Client] = field(default_factory=Counter)
    task: asyncio.Task[Any] | None = None


class Reads:
    """The running reads, and those that wait for their turn."""

    def __init__(self, max_reads: int) -> None:
        self._max_reads = max_reads
        self._running = 0
        self._reads: dict[Hashable, Read] = {}
        self._clients: dict[str, Client] = {}
        #: Clients without a read, with the time since when; the longest idle one first.
        self._idle: OrderedDict[Client, float] = OrderedDict()
        #: A heap of the clients that may have a turn: time used, then order of arrival.
        self._queue: list[tuple[float, int, Client]] = []
        self._arrivals = count()
        #: The time that the client of the latest turn had used.
        self._used = 0.0

    def is_alone(self, client: str) -> bool:
        """Return whether no other client asks."""
        self._forget_idle()
        return not self._clients or (len(self._clients) == 1 and client in self._clients)

    async def read(
        self, client: str, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """Run `work` at the client's turn. Return its result, or raise its error.

        Calls with the same `key` share one read. It runs at the earliest turn of all its clients.
        """
        loop = asyncio.get_running_loop()
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = Read(key, work, loop.create_future())
            # If all callers are gone, nobody else retrieves the error of a failed read.
            read.result.add_done_callback(lambda done: done.cancelled() or done.exception())
        asker = self._clients.get(client)
        if asker is None:
            asker = self._clients[client] = Client(client, used=self._used)
        elif not (asker.waiting or asker.running):
            # An idle client cannot save up more than this much time.
            asker.used = max(asker.used, self._used - IDLE_SECONDS)
        self._idle.pop(asker, None)
        read.askers[asker] += 1
        if read.task is None:
            asker.waiting[read] = None
            self._enqueue(asker)
            self._start_next()
        try:
            return cast("T", await asyncio.shield(read.result))
        finally:
            self._leave(read, asker)

    async def close(self) -> None:
        """Cancel the running reads, and drop those that wait."""
        reads = tuple(self._reads.values())
        for read in reads:
            if read.task is None:
                self._drop(read)
            else:
                read.task.cancel()
        await asyncio.gather(*(read.task for read in reads if read.task), return_exceptions=True)

    def _leave(self, read: Read, asker: Client) -> None:
        read.askers[asker] -= 1
        if not read.askers[asker]:
            del read.askers[asker]
            asker.waiting.pop(read, None)
            if not read.askers and read.task is None:
                self._drop(read)
        self._note_idle(asker)

    def _drop(self, read: Read) -> None:
        """Remove a read that has not started."""
        if self._reads.get(read.key) is read:
            del self._reads[read.key]
            for asker in read.askers:
                asker.waiting.pop(read, None)
            read.result.cancel()

    def _note_idle(self, client: Client) -> None:
        if not (client.waiting or client.running) and self._clients.get(client.name) is client:
            self._idle.pop(client, None)
            self._idle[client] = asyncio.get_running_loop().time()

    def _forget_idle(self) -> None:
        """Forget the clients that have been idle for `IDLE_SECONDS`."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            client, since = next(iter(self._idle.items()))
            if now - since < IDLE_SECONDS:
                return
            del self._idle[client], self._clients[client.name]

    def _enqueue(self, client: Client) -> None:
        """Queue the client for a turn, if it waits for a read and may have one more."""
        most = self._max_reads if len(self._clients) == 1 else 1
        if client.waiting and client.running < most and not client.queued:
            client.queued = True
            heappush(self._queue, (client.used, next(self._arrivals), client))

    def _start_next(self) -> None:
        """Start reads while more may run."""
        self._forget_idle()
        if len(self._clients) == 1:
            # The client may be alone only now, because the others were forgotten.
            self._enqueue(next(iter(self._clients.values())))
        while self._queue and self._running < self._max_reads:
            _, _, client = heappop(self._queue)
            client.queued = False
            if client.waiting:
                self._start(client)
                self._enqueue(client)

    def _start(self, client: Client) -> None:
        read = next(iter(client.waiting))
        for asker in read.askers:
            asker.waiting.pop(read, None)
        client.running += 1
        self._running += 1
        self._used = max(self._used, client.used)
        started = asyncio.get_running_loop().time()
        read.task = asyncio.create_task(read.work(), name="read")
        read.task.add_done_callback(partial(self._finish, read, client, started))

    def _finish(self, read: Read, client: Client, started: float, task: asyncio.Task[Any]) -> None:
        del self._reads[read.key]
        self._running -= 1
        client.running -= 1
        client.used += asyncio.get_running_loop().time() - started
        if task.cancelled():
            read.result.cancel()
        elif (error := task.exception()) is not None:
            read.result.set_exception(error)
        else:
            read.result.set_result(task.result())
        self._enqueue(client)
        self._note_idle(client)
        self._start_next()
