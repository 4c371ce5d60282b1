"""aiohttp-sse-client; it comes back by itself, and gives up when it cannot connect at once."""

from __future__ import annotations

import asyncio
import os

from aiohttp import ClientError, ClientTimeout
from aiohttp_sse_client.client import EventSource
from multidict import CIMultiDict
from say import say


async def read() -> None:
    # It sets the same header in other letters.
    headers: CIMultiDict[str] = CIMultiDict()
    while True:
        # Its own time-out would end the stream after five minutes.
        timeout = ClientTimeout(total=None, sock_read=60)
        # A connection that breaks off ends it, too.
        try:
            async with EventSource(os.environ["URL"], headers=headers, timeout=timeout) as source:
                async for event in source:
                    if event.last_event_id:
                        headers["Last-Event-ID"] = event.last_event_id
                    say(event.type, event.data)
        except ClientError:
            await asyncio.sleep(0.5)


asyncio.run(read())
