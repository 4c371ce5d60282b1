"""How one process asks the others a question, and answers theirs.

Promises: a neighbour that is dead, stuck or slow is named and holds nobody up longer than
`ANSWER_SECONDS`; nobody but processes of the same user is answered; nothing is left behind.
Does not belong here: what is asked.

Abstract Unix sockets (unix(7)): their names go with their processes, however those end. Other
users can see the names, so each side looks who the other is (SO_PEERCRED).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import ujson

#: How long a neighbour may take; one that is not stuck takes milliseconds.
ANSWER_SECONDS = 1.0
MAX_BYTES = 16 * 1024**2

Answer = Callable[[dict[str, Any]], Any]


class Neighbours:
    """The other processes of this server, as one of them asks them."""

    def __init__(self, index: int, workers: int, secret: bytes) -> None:
        """Process `index`, from 0, of `workers`, which share `secret`."""
        self._index = index
        self._workers = workers
        self._run = hashlib.sha256(b"neighbours" + secret).hexdigest()[:32]

    @contextlib.asynccontextmanager
    async def answering(self, answer: Answer) -> AsyncIterator[None]:
        """Answer the others' questions inside the block."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, TimeoutError, ValueError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    if _is_ours(writer):
                        question = ujson.loads(await reader.readline())
                        writer.write(ujson.dumps(answer(question)).encode() + b"\n")
                        await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(serve, self._name(self._index))
        try:
            yield
        finally:
            server.close()

    async def ask(self, question: dict[str, Any]) -> dict[int, Any]:
        """Return each other process's answer by its number, from 1; None where none came."""
        others = [number for number in range(self._workers) if number != self._index]
        answers = await asyncio.gather(*(self._ask(other, question) for other in others))
        return {other + 1: answer for other, answer in zip(others, answers, strict=True)}

    async def _ask(self, other: int, question: dict[str, Any]) -> Any:
        writer = None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(
                    self._name(other), limit=MAX_BYTES
                )
                if not _is_ours(writer):
                    return None
                writer.write(ujson.dumps(question).encode() + b"\n")
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
