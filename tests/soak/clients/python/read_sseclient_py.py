"""sseclient-py on requests; it parses, and coming back is the caller's to do."""

from __future__ import annotations

import os
import time

import requests
import sseclient
from say import say

headers, wait = {"Accept": "text/event-stream"}, 0.5
while True:
    try:
        response = requests.get(os.environ["URL"], headers=headers, stream=True, timeout=60)
        if response.ok:
            for event in sseclient.SSEClient(response).events():
                if event.id is not None:
                    headers["Last-Event-ID"] = event.id
                if event.retry is not None:
                    wait = int(event.retry) / 1000
                say(event.event, event.data)
    except requests.RequestException:
        pass
    time.sleep(wait)
