"""A test reader of one stream: it opens the stream, waits for blocks, and notes how it ended.

Promises: no wait is longer than its argument or FIRST_SECONDS.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import httpx
import ujson

from sse_labels.client.answers import words_in
from sse_labels.client.event_stream import Block, EventStream

#: How long bytes that the server sends at once may take.
FIRST_SECONDS = 5.0
#: The value of labels that the doctor publishes. As a filter it excludes all other labels.
VALUE = "sse-labels-doctor"


class StreamProbe:
    """One stream, whether it has ended, and the error with which the server ended it."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.blocks = self._read()
        self.ended = False
        self.error = ""

    async def opened(self) -> dict[str, Any] | None:
        """Return the data of StreamOpened; None when it does not come in time."""
        data = await self.first('"StreamOpened"', FIRST_SECONDS)
        opened: dict[str, Any] | None = None if data is None else ujson.loads(data)
        return opened

    async def first(self, part: str, seconds: float) -> str | None:
        """Return the data of the next block that contains `part`; an empty part is in every block.

        None: an error, the end of the stream, or no such block in time. After that nothing more can
        be read.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for block in self.blocks:
                    data = block.data or ""
                    if block.event == "error":
                        self.error = words_in(data, "an error")
                        return None
                    if part in data:
                        return data
                self.ended = True
        return None

    async def _read(self) -> AsyncGenerator[Block]:
        stream = EventStream()
        # A proxy that cuts the connection gives no reason; the caller knows only the time.
        with suppress(httpx.TransportError, httpx.DecodingError):
            async for piece in self.response.aiter_bytes():
                for block in stream.push(piece):
                    yield block


@asynccontextmanager
async def opened(client: httpx.AsyncClient) -> AsyncIterator[StreamProbe]:
    """Open a stream that contains no labels but the doctor's. TimeoutError: no answer in time."""
    request = client.build_request(
        "GET",
        "/stream",
        params={"values": VALUE},
        # Let a proxy compress the stream, if it would.
        headers={"Accept": "text/event-stream", "Accept-Encoding": "gzip"},
        timeout=httpx.Timeout(FIRST_SECONDS, read=None),
    )
    async with asyncio.timeout(FIRST_SECONDS):
        response = await client.send(request, stream=True)
        if response.status_code != 200:
            await response.aread()
    probe = StreamProbe(response)
    async with aclosing(response), aclosing(probe.blocks):
        yield probe
