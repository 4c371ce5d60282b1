"""Reads of the table: one for all who ask for the same, and by turns among clients.

Promises: at most `most` are under way. While one client asks it has all of them; while several ask
each has one at a time, and the next is of the client for whom was read the least, by time: a client
with 900 streams gets what a client with one gets. Who leaves does not cancel a query, because aiopg
closes the connection of a cancelled one; a read that nobody waits for any more does not begin.
Memory: one entry for each read that somebody waits for.
Does not belong here: what is read, what is kept of it, who a client is.
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

#: A client that asked within this time asks again soon: its share is kept. A backfill asks for its
#: next page when it has written one.
ASKING_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Client:
    """What one client waits for, in its order, and what was done for it."""

    name: str
    waiting: dict[Read, None] = field(default_factory=dict)
    under_way: int = 0
    #: Seconds that its reads took, since an origin that all who ask have in common.
    used: float = 0.0
    in_line: bool = False


@dataclass(eq=False, slots=True)
class Read:
    """One read, and who waits for it."""

    key: Hashable
    work: Callable[[], Coroutine[Any, Any, Any]]
    result: asyncio.Future[Any]
    askers: Counter[Client] = field(default_factory=Counter)
    task: asyncio.Task[Any] | None = None


class Reads:
    """What is being read, and what waits for its turn."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way = 0
        self._reads: dict[Hashable, Read] = {}
        self._clients: dict[str, Client] = {}
        #: Those that wait for nothing, by when they last did.
        self._resting: OrderedDict[Client, float] = OrderedDict()
        #: Those whose turn may come, by what they have used; and how they came.
        self._line: list[tuple[float, int, Client]] = []
        self._tickets = count()
        #: What the client whose turn came last had used.
        self._used = 0.0

    def alone(self, client: str) -> bool:
        """Say whether nobody else asks."""
        self._forget()
        return not self._clients or (len(self._clients) == 1 and client in self._clients)

    async def read(
        self, client: str, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """Return what `work` returns, or raise what it raises, once it is the client's turn.

        Reads with the same `key` are one, which has the earliest turn of all who ask for it.
        """
        loop = asyncio.get_running_loop()
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = Read(key, work, loop.create_future())
            # All may be gone when it fails; then nobody would look at the error.
            read.result.add_done_callback(lambda done: done.cancelled() or done.exception())
        asker = self._clients.get(client)
        if asker is None:
            asker = self._clients[client] = Client(client, used=self._used)
        elif not (asker.waiting or asker.under_way):
            # Who asked for little has saved little up.
            asker.used = max(asker.used, self._used - ASKING_SECONDS)
        self._resting.pop(asker, None)
        read.askers[asker] += 1
        if read.task is None:
            asker.waiting[read] = None
            self._line_up(asker)
            self._go_on()
        try:
            return cast("T", await asyncio.shield(read.result))
        finally:
            self._leave(read, asker)

    async def close(self) -> None:
        """End all that is under way, and what waits."""
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
        self._rest(asker)

    def _drop(self, read: Read) -> None:
        """Let a read that has not begun never begin."""
        if self._reads.get(read.key) is read:
            del self._reads[read.key]
            for asker in read.askers:
                asker.waiting.pop(read, None)
            read.result.cancel()

    def _rest(self, client: Client) -> None:
        if not (client.waiting or client.under_way) and self._clients.get(client.name) is client:
            self._resting.pop(client, None)
            self._resting[client] = asyncio.get_running_loop().time()

    def _forget(self) -> None:
        """Forget the clients that no longer ask."""
        now = asyncio.get_running_loop().time()
        while self._resting:
            client, since = next(iter(self._resting.items()))
            if now - since < ASKING_SECONDS:
                return
            del self._resting[client], self._clients[client.name]

    def _line_up(self, client: Client) -> None:
        """Let its turn come, if it waits and has not what it may have already."""
        most = self._most if len(self._clients) == 1 else 1
        if client.waiting and client.under_way < most and not client.in_line:
            client.in_line = True
            heappush(self._line, (client.used, next(self._tickets), client))

    def _go_on(self) -> None:
        """Begin what may begin."""
        self._forget()
        if len(self._clients) == 1:
            # It may be alone only since the others were forgotten.
            self._line_up(next(iter(self._clients.values())))
        while self._line and self._under_way < self._most:
            _, _, client = heappop(self._line)
            client.in_line = False
            if client.waiting:
                self._begin(client)
                self._line_up(client)

    def _begin(self, client: Client) -> None:
        read = next(iter(client.waiting))
        for asker in read.askers:
            asker.waiting.pop(read, None)
        client.under_way += 1
        self._under_way += 1
        self._used = max(self._used, client.used)
        began = asyncio.get_running_loop().time()
        read.task = asyncio.create_task(read.work(), name="read")
        read.task.add_done_callback(partial(self._ended, read, client, began))

    def _ended(self, read: Read, client: Client, began: float, task: asyncio.Task[Any]) -> None:
        del self._reads[read.key]
        self._under_way -= 1
        client.under_way -= 1
        client.used += asyncio.get_running_loop().time() - began
        if task.cancelled():
            read.result.cancel()
        elif (error := task.exception()) is not None:
            read.result.set_exception(error)
        else:
            read.result.set_result(task.result())
        self._line_up(client)
        self._rest(client)
        self._go_on()
