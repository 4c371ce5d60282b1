"""When to ask a server again, and when not: for every client of ours.

Promises: waits grow, are jittered, keep to what the server asks for, and end where they are to.
Does not belong here: opening anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from sse_labels.backoff import Backoff
from sse_labels.errors import SseLabelsError
from sse_labels.protocol.seq import seconds_in

CONNECT_SECONDS = 10.0
#: Answers after which asking again the same way may help.
TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))
#: Errors that end a stream because its seqs are not those that the cursor belongs to.
BEGAN_ANEW = ("FutureCursor", "EpochChanged")
#: No hint of a server is followed longer than this.
HINT_MAX_SECONDS = 3600.0
#: A connection that held for so long was a good one: what ends it is a new trouble.
STEADY_SECONDS = 30.0
#: What to do about an answer 401, in every client that reads.
TOKEN_HINT = "give a token that may read: --token, or SSE_LABELS_TOKEN"  # noqa: S105


class NotRead(SseLabelsError):
    """Why a server's stream is read no further.

    `name` is the error that the server ended it with, `after_seconds` how long it wants to be left
    alone.
    """

    def __init__(self, message: str, name: str = "", after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.name = name
        self.after_seconds = after_seconds


class Refused(NotRead):
    """Asking again the same way will hardly help."""


class Lost(NotRead):
    """The connection, or this answer; asking again may help."""


class Unavailable(Lost):
    """The server is there, and says that it cannot answer now."""


def after_seconds(headers: Mapping[str, str] | None) -> float:
    """Return how long an answer asks to wait, 0 when it does not (RFC 9110, section 10.2.3)."""
    text = (headers or {}).get("Retry-After", "")
    seconds: float | None = seconds_in(text)
    if seconds is None:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds)


class Patience:
    """Says how long to wait after each loss, until it has waited `retry_seconds` for nothing."""

    def __init__(
        self, retry_seconds: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`retry_seconds` is None for whoever waits for ever."""
        self.retry_seconds = retry_seconds
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
        asked = min(max(self.hint_seconds, lost.after_seconds), HINT_MAX_SECONDS)
        wait = asked + self._backoff.next()
        if self.retry_seconds is not None and self._waited + wait > self.retry_seconds:
            more = f", it asks to wait {asked:g} s" if asked > self.retry_seconds else ""
            raise Refused(f"{lost}; given up after {self._waited:.1f} s of waiting{more}")
        self._waited += wait
        return wait
