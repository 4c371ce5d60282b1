"""What a client writes: one line of JSON for each message that its library handed out."""

from __future__ import annotations

import json


def say(event: str | None, data: str) -> None:
    """Print a label's seq, the name of another event, or that a message had no data."""
    if not data:
        said: dict[str, object] = {"empty": event or "message"}
    else:
        message = json.loads(data)
        said = {"seq": message["seq"]} if "seq" in message else {"event": event, **message}
    print(json.dumps(said), flush=True)  # noqa: T201
