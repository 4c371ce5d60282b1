"""The messages between the supervisor and a worker.

Promises: no secret is on a command line. A worker notices the end of its supervisor, whatever
ended it, and ends after the time that draining takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from sse_labels import errors
from sse_labels.config import Settings
from sse_labels.errors import ConfigError, SseLabelsError

#: How much longer than `drain_seconds` a worker may take to end before it is killed.
GRACE_SECONDS = 1.0

READY = b"ready\n"
#: A worker's event loop sends TURNING every TURN_SECONDS. A suspended or stuck worker does not.
TURNING = b".\n"
TURN_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """All data that a worker gets. Its descriptors are inherited under the same numbers."""

    index: int
    #: How many workers with this index have ended before.
    replaced: int
    #: The limits are this worker's share of the server's.
    settings: Settings
    dsn: str
    publish_token: str | None
    listeners: tuple[int, ...]
    words: int
    #: A random name of this server on this machine.
    run: str

    @property
    def name(self) -> str:
        """The worker's name in log lines and metrics."""
        return f"worker-{self.index + 1}"

    @classmethod
    def read(cls, pipe: BinaryIO) -> Job | None:
        """Read the job from `pipe`; return None when the supervisor has ended before."""
        try:
            job: Job = pickle.load(pipe)  # noqa: S301 - the pipe is our parent's
        except (EOFError, pickle.UnpicklingError):
            return None
        return job


def encode_error(error: SseLabelsError) -> bytes:
    """Return the line that reports to the supervisor why a worker ends."""
    said: list[object] = [str(error)]
    if isinstance(error, ConfigError):
        plain = isinstance(error.value, str | int | float | None)
        said = [error.key, error.value if plain else str(error.value), error.expected]
    return json.dumps([type(error).__name__, *said]).encode() + b"\n"


def decode_error(line: bytes) -> SseLabelsError:
    """Return the error that `encode_error` encoded.

    Raises ValueError, TypeError or AttributeError when the line is not such an error.
    """
    name, *said = json.loads(line)
    error: SseLabelsError = getattr(errors, name)(*said)
    return error


def when_the_supervisor_ends(pipe: int, drain: Callable[[], object], seconds: float) -> None:
    """Call `drain` when the other end of `pipe` is closed; end the process `seconds` later.

    It waits in a thread, because a stuck event loop must not keep the process and its port.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(pipe, 1):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends already
            drain()
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()
