"""The whole application in the test's own process, with short times."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from sse_labels.app import App

PUBLISH_TOKEN = "test-publish-token"

#: Short times, so that tests wait for events and never for a timer.
QUICK: dict[str, Any] = {
    "port": 0,
    "migrate": False,
    "poll_seconds": 0.2,
    "gather_seconds": 0.0,
    "drain_seconds": 1.0,
}


@dataclass
class Server:
    """A server running in this process."""

    app: App
    url: str
    stream_url: str


#: `async with run_server(**settings) as server`
RunServer = Callable[..., AbstractAsyncContextManager[Server]]
