"""The consumers: each reads the stream with a filter, and notes what it received."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from oracle import chance
from oracle.verdict import Entry
from oracle.wire import EventStream, WireError, exchange, stream_target

SOURCES = [f"did:plc:{letter * 24}" for letter in "abcd"]
AUTHORS = [f"did:plc:{letter * 24}" for letter in "wxyz"]
VALUES = ["spam", "porn", "rude", "!hide"]


@dataclass(frozen=True)
class Wanted:
    """A consumer's filter; its code is not the service's."""

    sources: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def parameters(self) -> list[tuple[str, str]]:
        """The query parameters of this filter."""
        return [
            *(("sources", source) for source in self.sources),
            *(("values", value) for value in self.values),
            *(("uriPatterns", pattern) for pattern in self.patterns),
        ]

    def passes(self, label: dict[str, Any]) -> bool:
        """Whether a label, as JSON, passes the filter."""
        return (
            (not self.sources or label["src"] in self.sources)
            and (not self.values or label["val"] in self.values)
            and (not self.patterns or any(_matches(label["uri"], p) for p in self.patterns))
        )


def _matches(uri: str, pattern: str) -> bool:
    return uri[: len(pattern) - 1] == pattern[:-1] if pattern[-1] == "*" else uri == pattern


class Consumer:
    """Reads the stream, notes every event, and reconnects with its last id after every end."""

    #: Whether a server that stops sends ServerStopping.
    gets_server_stopping = True

    def __init__(
        self,
        name: str,
        seed: str,
        port: int,
        *,
        wanted: Wanted | None = None,
        live: bool = False,
        slow: bool = False,
        restless: bool = False,
        shared: dict[str, str],
    ) -> None:
        self.name = name
        self.wanted = wanted or Wanted()
        self.slow = slow
        self.restless = restless
        self.transcript: list[Entry] = []
        #: All labels after this seq are expected. For a live consumer the stream gives it.
        self.start: int | None = None if live else 0
        self.position = 0
        self.streams = 0
        self.heartbeats = 0
        self.ends: Counter[str] = Counter()
        #: Error events that may end a stream.
        self.allowed = {"ConsumerTooSlow", "ServerStopping", "NotReady"}
        self.complaints: list[str] = []
        self.hurry = False
        self._random = chance(seed, name)
        self._port = port
        self._last_id = ""
        self._retry_seconds = 0.02
        # All consumers share one object for equal data, so that a long run fits into memory.
        self._shared = shared

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            try:
                await self._read()
                self.ends["end"] += 1
            except (OSError, TimeoutError) as error:
                self.ends[type(error).__name__] += 1
            except (WireError, UnicodeDecodeError) as error:
                self.complaints.append(f"{self.name}: {error!r}")
            await asyncio.sleep(min(0.2, self._retry_seconds))

    async def _read(self) -> None:
        parameters = self.wanted.parameters()
        headers = [("Accept", "text/event-stream")]
        if self._last_id:
            headers.append(("Last-Event-ID", self._last_id))
        elif self.start is not None:
            parameters.append(("cursor", str(self.start)))
        target = stream_target(parameters)
        buffer = 8192 if self.slow else None
        seconds = self._random.uniform(0.05, 3.0) if self.restless and not self.hurry else None
        async with (
            asyncio.timeout(seconds),
            exchange(self._port, "GET", target, headers, receive_buffer=buffer) as reply,
        ):
            if reply.status != 200:
                # 503 while the server starts or stops; every other status is wrong.
                if reply.status != 503:
                    body = b"".join([piece async for piece in reply.body()])
                    self.complaints.append(f"{self.name}: {reply.status} {body[:200]!r}")
                return
            stream = EventStream(self._last_id)
            self.streams += 1
            async for piece in reply.body(512 if self.slow and not self.hurry else 65536):
                beats = stream.comments + stream.silent_blocks
                events = stream.feed(piece)
                # Before the labels, because the first may be in the same piece as the start.
                if self.start is None and stream.opened_at:
                    self.start = int(stream.opened_at)
                for event in events:
                    self._take(event.kind, event.last_id, event.data)
                self.heartbeats += stream.comments + stream.silent_blocks - beats
                self._last_id = stream.last_id
                if self._last_id:
                    self.position = int(self._last_id)
                if stream.retry_ms is not None:
                    self._retry_seconds = stream.retry_ms / 1000
                if self.slow and not self.hurry:
                    await asyncio.sleep(self._random.uniform(0, 0.02))

    def _take(self, kind: str, last_id: str, data: str) -> None:
        if kind == "message":
            if self.start is None:
                self.complaints.append(f"{self.name}: a label before the stream gave its start")
                self.start = 0
            self.transcript.append(Entry(int(last_id), self._shared.setdefault(data, data)))
        elif kind == "error":
            name = data.partition('"error":"')[2].partition('"')[0]
            self.ends[name] += 1
            if name not in self.allowed:
                self.complaints.append(f"{self.name}: {data}")
        elif kind != "info" or not data.startswith(
            ('{"name":"StreamOpened"', '{"name":"CaughtUp"')
        ):
            self.complaints.append(f"{self.name}: {kind} {data}")
