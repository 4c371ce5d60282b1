"""httpx-sse, in the loop that its documentation shows: come back with the last id."""

from __future__ import annotations

import os
import time

import httpx
from httpx_sse import SSEError, connect_sse
from say import say

last_event_id, wait = "", 0.5
while True:
    headers = {"Accept": "text/event-stream"}
    if last_event_id:
        headers["Last-Event-ID"] = last_event_id
    try:
        with (
            httpx.Client(timeout=60) as client,
            connect_sse(client, "GET", os.environ["URL"], headers=headers) as source,
        ):
            for event in source.iter_sse():
                last_event_id = event.id
                if event.retry is not None:
                    wait = event.retry / 1000
                say(event.event, event.data)
    except (httpx.TransportError, SSEError):
        pass
    time.sleep(wait)
