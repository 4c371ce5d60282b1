"""A reader of streams with a client by other authors (httpx-sse)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent, aconnect_sse

#: A test that waits longer than this fails.
PATIENCE_SECONDS = 20.0


@dataclass
class Reader:
    """One open stream, and all that it has received."""

    response: httpx.Response
    _blocks: AsyncIterator[ServerSentEvent]
    #: The events, as JSON, in the order of their arrival.
    events: list[dict[str, Any]] = field(default_factory=list)
    #: The data of StreamOpened.
    opened: dict[str, Any] = field(default_factory=dict)
    #: The other info and error events, as (event, JSON).
    news: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    last_id: str = ""
    retry_ms: int | None = None

    async def until_opened(self) -> int:
        """Read the opening; return the seq after which the stream starts."""
        await self.until(lambda: self.last_id != "")
        return int(self.last_id)

    async def until_events(self, count: int) -> list[dict[str, Any]]:
        """Read until `count` events have been received in all."""
        await self.until(lambda: len(self.events) >= count)
        return self.events

    async def until_seq(self, seq: int) -> list[dict[str, Any]]:
        """Read until the last id is at least `seq`."""
        await self.until(lambda: self.last_id != "" and int(self.last_id) >= seq)
        return self.events

    async def until_news(self, event: str) -> dict[str, Any]:
        """Read until an `info` or `error` event has come; return its data."""
        await self.until(lambda: any(name == event for name, _ in self.news))
        return next(data for name, data in self.news if name == event)

    async def until_closed(self) -> None:
        """Read to the end of the response."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for block in self._blocks:
                self._take(block)

    async def until(self, enough: Callable[[], bool]) -> None:
        """Read block by block until `enough()` is true."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not enough():
                self._take(await anext(self._blocks))

    def _take(self, block: ServerSentEvent) -> None:
        self.last_id = block.id or self.last_id
        self.retry_ms = block.retry if block.retry is not None else self.retry_ms
        if block.event in ("info", "error"):
            news = json.loads(block.data)
            if news.get("name") == "StreamOpened":
                self.opened = news
            else:
                self.news.append((block.event, news))
        elif block.data:
            event = json.loads(block.data)
            assert block.event == "message"
            assert block.id == str(event["seq"])
            self.events.append(event)


@asynccontextmanager
async def reading(
    url: str, *, last_event_id: str | None = None, **query: Any
) -> AsyncIterator[Reader]:
    """Open a stream; its status must be 200."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    async with (
        # Without TLS: reading the certificates would take half the time of a quick test.
        httpx.AsyncClient(timeout=PATIENCE_SECONDS, verify=False) as client,
        aconnect_sse(client, "GET", url, headers=headers, params=query or None) as source,
    ):
        assert source.response.status_code == 200, await source.response.aread()
        yield Reader(source.response, _blocks(source))


async def _blocks(source: EventSource) -> AsyncIterator[ServerSentEvent]:
    async for block in source.aiter_sse():
        yield block
