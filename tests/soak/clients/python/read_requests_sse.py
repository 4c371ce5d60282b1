"""requests-sse; it comes back by itself."""

from __future__ import annotations

import os
import time

from requests_sse import EventSource, InvalidContentTypeError, InvalidStatusCodeError
from say import say

last_event_id = None
while True:
    try:
        with EventSource(os.environ["URL"], timeout=60, latest_event_id=last_event_id) as source:
            for event in source:
                last_event_id = event.last_event_id or last_event_id
                say(event.type, event.data)
    except (InvalidStatusCodeError, InvalidContentTypeError, OSError):
        pass
    time.sleep(0.5)
