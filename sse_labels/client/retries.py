"""Decides when to ask a server again, for every client of this package.

Promises: waits grow, are jittered, and are at least as long as the server asks. The sum of the
waits is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from sse_labels.backoff import Backoff
from sse_labels.errors import SseLabelsError
from sse_labels.protocol.seq import seconds_in

CONNECT_SECONDS = 10.0
#: The status codes after which the same request may succeed later.
TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))
#: The errors that end a stream because the cursor belongs to other seqs than the server has.
BEGAN_ANEW = ("FutureCursor", "EpochChanged")
#: The longest wait that a server's hint can cause.
HINT_MAX_SECONDS = 3600.0
#: A connection that lasted this long was a good one. Its end counts as a first loss.
STEADY_SECONDS = 30.0
#: The advice after an answer 401, for every client that reads.
TOKEN_HINT = "give a token that may read: --token, or SSE_LABELS_TOKEN"  # noqa: S105


class NotRead(SseLabelsError):
    """The reason why reading a server's stream stopped.

    `name` is the error with which the server ended the stream. `after_seconds` is how long the
    server asks clients to wait.
    """

    def __init__(self, message: str, name: str = "", after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.name = name
        self.after_seconds = after_seconds


class Refused(NotRead):
    """The same request will most likely fail again."""


class Lost(NotRead):
    """The connection or the answer was lost. The same request may succeed later."""


class Unavailable(Lost):
    """The server answers that it is unavailable now."""


def after_seconds(headers: Mapping[str, str] | None) -> float:
    """Return how long an answer asks to wait (RFC 9110, section 10.2.3). 0: it does not ask."""
    text = (headers or {}).get("Retry-After", "")
    seconds: float | None = seconds_in(text)
    if seconds is None:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds)


class Retries:
    """Returns how long to wait after each loss, up to `retry_seconds` in a row without success."""

    def __init__(
        self, retry_seconds: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`retry_seconds` None means that the client retries forever."""
        self.retry_seconds = retry_seconds
        self._clock = clock
        self._backoff = Backoff(first=0.5, longest=30.0)
        self._waited = 0.0
        self._opened: float | None = None
        #: The wait that the server's last `retry:` asks for (HTML standard).
        self.hint_seconds = 0.0

    def opened(self) -> None:
        """Note that a connection opened."""
        self._opened = self._clock()

    def progress(self) -> None:
        """Note that the client received something new."""
        self._backoff.reset()
        self._waited = 0.0

    def wait_seconds(self, lost: Lost) -> float:
        """Return how long to wait. Raises Refused when that exceeds `retry_seconds`."""
        if self._opened is not None and self._clock() - self._opened > STEADY_SECONDS:
            self.progress()
        self._opened = None
        # Added to the server's hint: the hint may be the same for all clients, and does not grow.
        asked = min(max(self.hint_seconds, lost.after_seconds), HINT_MAX_SECONDS)
        wait = asked + self._backoff.next()
        if self.retry_seconds is not None and self._waited + wait > self.retry_seconds:
            more = f", it asks to wait {asked:g} s" if asked > self.retry_seconds else ""
            raise Refused(f"{lost}; given up after {self._waited:.1f} s of waiting{more}")
        self._waited += wait
        return wait
