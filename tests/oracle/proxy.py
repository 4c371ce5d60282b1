"""A proxy between the service and PostgreSQL; it can cut, refuse or swallow connections.

It runs in the test's event loop. It does not parse PostgreSQL's protocol; it only searches for a
text.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class _Pair:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    cut_at_answer: bool = False

    def abort(self) -> None:
        for writer in (self.client, self.server):
            if writer is None:
                continue
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                # A reset instead of an orderly end: bytes on the way are lost.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on its own TCP port and forwards to PostgreSQL's Unix socket."""

    def __init__(self, target: Callable[[], str]) -> None:
        self.port = 0
        self.connections = 0
        self.cuts = 0
        self._target = target
        self._listener: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hole = False
        self._marker: bytes | None = None
        self._cut_before = False

    async def __aenter__(self) -> Proxy:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # The loop closes aborted transports in its next step.
        await asyncio.sleep(0)

    async def accept(self) -> None:
        """Forward again; connections that were swallowed are reset, and their bytes stay lost."""
        if self._hole:
            self.cut()
            self._hole = False
        if self._listener is None:
            self._listener = await asyncio.start_server(self._take, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        for pair in tuple(self._pairs):
            pair.abort()

    def refuse(self) -> None:
        """Reset every connection and refuse new ones."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.cut()

    def swallow(self) -> None:
        """Accept connections and bytes and forward nothing, as when packets are dropped."""
        self._hole = True

    def cut_next(self, marker: bytes, *, before: bool) -> None:
        """Cut the connection that next sends `marker`: before it is forwarded, or at the answer."""
        self._marker, self._cut_before = marker, before

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair(writer)
        self._pairs.add(pair)
        self.connections += 1
        try:
            if self._hole:
                while await reader.read(65536):
                    pass
                return
            from_server, pair.server = await asyncio.open_unix_connection(self._target())
            one = asyncio.ensure_future(self._pump(reader, pair.server, pair, asking=True))
            two = asyncio.ensure_future(self._pump(from_server, writer, pair, asking=False))
            try:
                await asyncio.wait({one, two}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in (one, two):
                    pump.cancel()
                await asyncio.gather(one, two, return_exceptions=True)
        except OSError:
            pass  # PostgreSQL or the client is away.
        finally:
            # Without a cut, an orderly end is forwarded as an orderly end.
            self._pairs.discard(pair)
            for each in (pair.client, pair.server):
                if each is not None:
                    each.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair, asking: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._hole:
                    continue
                if asking and self._marker is not None and self._marker in data:
                    self._marker = None
                    pair.cut_at_answer = not self._cut_before
                    if self._cut_before:
                        self.cuts += 1
                        pair.abort()
                        return
                elif not asking and pair.cut_at_answer:
                    # PostgreSQL answers after the commit: the label is stored, its answer is lost.
                    self.cuts += 1
                    pair.abort()
                    return
                writer.write(data)
                await writer.drain()


def unix_socket_of(directory: str, port: str = "5432") -> str:
    """The path of the server's socket for libpq."""
    return os.fspath(f"{directory}/.s.PGSQL.{port}")
