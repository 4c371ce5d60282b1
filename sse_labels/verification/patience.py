"""How long one goes on trying, and what ends it at once.

Promises: waits grow, are jittered, keep to what the server asks for, and end.
Stands beside the readers.
Does not belong here: opening anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sse_labels.backoff import Backoff
from sse_labels.errors import SseLabelsError

#: The server writes at least a heartbeat each 15 s; after this silence the connection is dead.
SILENCE_SECONDS = 45.0
CONNECT_SECONDS = 10.0
#: Time between two lines that say how far it is.
PROGRESS_SECONDS = 10.0
#: Answers after which asking again the same way may help.
TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))
#: Errors after which a cursor is no good any more, on whatever wire they come.
FINAL_ERRORS = ("FutureCursor", "EpochChanged")
#: A connection that held for so long was a good one: what ends it is a new trouble.
STEADY_SECONDS = 30.0


class Refused(SseLabelsError):
    """Asking again cannot help."""


class Lost(SseLabelsError):
    """The connection, or this answer; asking again may help."""

    def __init__(self, message: str, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


class Unavailable(Lost):
    """The server is there, and says that it cannot answer now."""


class Patience:
    """Says how long to wait after each loss, until it has waited `retry_seconds` for nothing."""

    def __init__(self, retry_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._backoff = Backoff(first=0.5, longest=30.0)
        self._waited = 0.0
        self._opened: float | None = None
        #: How long the server asked to wait; it holds until it says otherwise (HTML standard).
        self.hint_seconds = 0.0

    def opened(self) -> None:
        """Note that a connection was made."""
        self._opened = self._clock()

    def progress(self) -> None:
        """Note that something came which had not come before."""
        self._backoff.reset()
        self._waited = 0.0

    def wait_seconds(self, lost: Lost) -> float:
        """Return how long to wait; raise Refused when it has been long enough."""
        if self._opened is not None and self._clock() - self._opened > STEADY_SECONDS:
            self.progress()
        self._opened = None
        # On top of the server's hint: it may be the same for all, and it does not grow.
        asked = max(self.hint_seconds, lost.after_seconds)
        wait = asked + self._backoff.next()
        if self._waited + wait > self._retry_seconds:
            more = f", it asks to wait {asked:g} s" if asked > self._retry_seconds else ""
            raise Refused(f"{lost}; given up after {self._waited:.1f} s of waiting{more}")
        self._waited += wait
        return wait
