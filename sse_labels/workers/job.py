"""What the supervisor and a worker say to each other.

Promises: secrets are on no command line; a worker knows that its supervisor has ended,
however that came about, and does not outlive it by more than draining takes.
Does not belong here: what either does with it.
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

#: How long a worker that was told to end may take beyond `drain_seconds`; then it is killed.
GRACE_SECONDS = 1.0

READY = b"ready\n"
#: A worker's event loop says this so often; one that is stopped or stuck does not.
TURNING = b".\n"
TURN_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """All that a worker is told; descriptors are inherited under the same numbers."""

    index: int
    #: How many workers have ended in its place.
    replaced: int
    #: Limits are its share of the server's.
    settings: Settings
    dsn: str
    publish_token: str | None
    listeners: tuple[int, ...]
    words: int
    #: Names this server among those of the machine.
    run: str

    @property
    def name(self) -> str:
        """What log lines and metrics call the worker."""
        return f"worker-{self.index + 1}"

    @classmethod
    def read(cls, pipe: BinaryIO) -> Job | None:
        """Return the job that comes; None when the supervisor has ended before."""
        try:
            job: Job = pickle.load(pipe)  # noqa: S301 - the pipe is our parent's
        except (EOFError, pickle.UnpicklingError):
            return None
        return job


def encode_error(error: SseLabelsError) -> bytes:
    """Return the line that tells the supervisor why a worker ends."""
    said: list[object] = [str(error)]
    if isinstance(error, ConfigError):
        plain = isinstance(error.value, str | int | float | None)
        said = [error.key, error.value if plain else str(error.value), error.expected]
    return json.dumps([type(error).__name__, *said]).encode() + b"\n"


def decode_error(line: bytes) -> SseLabelsError:
    """Return the error that `encode_error` was given.

    Raises ValueError, TypeError or AttributeError when the line is something else.
    """
    name, *said = json.loads(line)
    error: SseLabelsError = getattr(errors, name)(*said)
    return error


def when_the_supervisor_ends(pipe: int, drain: Callable[[], object], seconds: float) -> None:
    """Call `drain`, in a thread, once the other end of `pipe` is closed; end after `seconds`.

    A thread: an event loop that is stuck must not keep the process alive, and the port taken.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(pipe, 1):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed, we are leaving already
            drain()
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()
