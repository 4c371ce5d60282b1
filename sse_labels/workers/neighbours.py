"""Questions between workers, and the counts by which a worker lets others accept.

Promises: a worker that is dead, stuck or slow is named, and delays the others by no more than
`ANSWER_SECONDS`. Only processes of the same user get an answer. No file is left behind.

The sockets are abstract Unix sockets (unix(7)): the kernel removes their names when the process
ends, however it ends. Other users can see the names, so each side checks the other's user
(SO_PEERCRED).
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import ujson

from sse_labels.web import neighbours

#: How long an answer may take; a worker that is not stuck answers in milliseconds.
ANSWER_SECONDS = 1.0
MAX_BYTES = 16 * 1024**2
#: A worker lets another one accept when it holds more connections than that one, by more than
#: AHEAD and one AHEAD_PART-th of its own connections. Many new connections at once should not wait
#: for a perfect balance.
AHEAD = 4
AHEAD_PART = 16
_WORD_BYTES = 8


def new_words(workers: int) -> int:
    """Return the descriptor of a new file without a name; `words_in` maps it."""
    descriptor = os.memfd_create("sse-labels")
    os.truncate(descriptor, (workers + 1) * _WORD_BYTES)
    return descriptor


def words_in(descriptor: int) -> memoryview:
    """Return numbers that all processes share; the processor writes each number atomically.

    One number per worker, which only that worker writes: 0 while it does not accept, else its open
    connections plus 1. The last number is how often the embedded PostgreSQL was restarted; the
    first process writes it.
    """
    return memoryview(mmap.mmap(descriptor, 0)).cast("q")


class Neighbours(neighbours.Neighbours):
    """The other workers, as seen by one worker."""

    def __init__(self, index: int, words: memoryview, run: str) -> None:
        """`index`, from 0, is that of this worker; all share `words`; `run` names the server."""
        super().__init__()
        self.number = index + 1
        self._index = index
        self._others = [other for other in range(len(words) - 1) if other != index]
        self._words = words
        self._run = run
        self._yielded_to: dict[int, int] = {}

    def hold(self, connections: int | None) -> None:
        """Publish the number of connections of this worker; None: it accepts no more."""
        self._words[self._index] = 0 if connections is None else connections + 1

    def yields(self, *, full: bool) -> bool:
        """Return whether another worker should accept: it holds clearly fewer connections.

        If `full`, any smaller number is enough. A worker that has accepted none since this worker
        last yielded is not counted: it is busy or stuck, and clients must not wait for it.
        """
        mine = self._words[self._index]
        few = mine if full else mine - AHEAD - mine // AHEAD_PART
        behind = {
            other: held for other in self._others if 0 < (held := self._words[other]) < few
        }  # fmt: skip
        if behind.items() <= self._yielded_to.items():
            return False
        self._yielded_to = behind
        return True

    def accepted(self) -> None:
        """Yield again, also to the same workers: they are not stuck.

        Otherwise a full worker would refuse the next client, although another worker has room.
        """
        self._yielded_to = {}

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer the questions of other workers during the block."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, TimeoutError, ValueError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    if _is_ours(writer):
                        name, *arguments = ujson.loads(await reader.readline())
                        said = ujson.dumps(self.answers[name](*arguments))
                        writer.write(said.encode() + b"\n")
                        await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(answer, self._name(self._index))
        try:
            yield
        finally:
            server.close()

    async def ask(self, name: str, *arguments: Any) -> tuple[list[Any], list[int]]:
        """Return the answers of all workers, and the numbers of those that did not answer."""
        answers, _ = await super().ask(name, *arguments)
        question = ujson.dumps([name, *arguments]).encode() + b"\n"
        others = await asyncio.gather(*(self._ask(other, question) for other in self._others))
        silent = [
            other + 1 for other, said in zip(self._others, others, strict=True) if said is None
        ]
        return answers + [said for said in others if said is not None], silent

    async def _ask(self, other: int, question: bytes) -> Any:
        writer = None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(
                    self._name(other), limit=MAX_BYTES
                )
                if not _is_ours(writer):
                    return None
                writer.write(question)
                return ujson.loads(await reader.readline())
        except (OSError, TimeoutError, ValueError):
            return None
        finally:
            if writer is not None:
                writer.close()

    def _name(self, index: int) -> str:
        return f"\0sse-labels-{self._run}-{index}"


def _is_ours(writer: asyncio.StreamWriter) -> bool:
    raw = writer.get_extra_info("socket")
    _, uid, _ = struct.unpack("3i", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())
