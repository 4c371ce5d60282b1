"""The registry of open streams: it limits their number, and ends them.

Promises: every end of a stream frees what the stream holds: a place, and its address's share. A
stream ends when the token that opened it expires.
Does not belong here: who may open a stream (`stream`), what a stream writes (`delivery`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sse_labels.config import Settings
from sse_labels.errors import (
    NotReady,
    ServerStopping,
    StreamCut,
    TokenExpired,
    TooManyConnections,
)
from sse_labels.feed.outbox import Outbox
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.web.addresses import PerAddress

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenStream:
    """One open stream."""

    outbox: Outbox
    client: str
    filter: Filter | None
    #: The claim `sub` of the token that opened the stream. The token's issuer chose the text.
    subject: str | None
    #: The key under which `PerAddress` counts the stream.
    share: str | None
    #: 64 random bits: unique across workers and restarts, and hard to guess.
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    opened: float = field(default_factory=time.monotonic)
    #: The timer that checks whether the token has expired.
    expiry: asyncio.TimerHandle | None = None


class Streams:
    """All streams that are open in this process."""

    def __init__(
        self,
        metrics: Metrics,
        settings: Settings,
        exempt: Callable[[str], bool],
        token_clock: Callable[[], float],
    ) -> None:
        """`exempt` returns whether an address has no limit. Tokens expire by `token_clock`."""
        self._metrics = metrics
        self._most = settings.max_streams
        self._recheck_seconds = settings.heartbeat_seconds
        self._per_address = PerAddress(settings.max_per_address, exempt)
        self._token_clock = token_clock
        self._stopping = False
        #: By their ids.
        self.open: dict[str, OpenStream] = {}
        metrics.gauges["streams"] = lambda: len(self.open)
        metrics.gauges["streams_limit"] = lambda: self._most
        metrics.gauges["streams_backfilling"] = lambda: sum(
            not stream.outbox.caught_up for stream in self.open.values()
        )

    def full(self) -> bool:
        """Return whether the number of open streams has reached its limit."""
        return len(self.open) >= self._most

    def check_room(self) -> None:
        """Raise NotReady or TooManyConnections when no stream may open now."""
        if self._stopping:
            raise NotReady("the server is stopping")
        if self.full():
            raise TooManyConnections(f"{self._most} streams are open, the most here")

    def let_in(
        self,
        outbox: Outbox,
        client: str,
        filter: Filter | None,
        subject: str | None,
        token_expires_at: float | None,
    ) -> OpenStream:
        """Register and return a new stream.

        Raises the errors of `check_room`, and TooManyFromAddress.
        """
        self.check_room()
        share = self._per_address.take(client)
        stream = OpenStream(outbox, client, filter, subject, share)
        self.open[stream.id] = stream
        if token_expires_at is not None:
            self._end_at(stream, token_expires_at)
        return stream

    def ended(self, stream: OpenStream, how: str) -> None:
        """Remove a stream that ended, and free its place and its address's share."""
        if stream.expiry is not None:
            stream.expiry.cancel()
        del self.open[stream.id]
        self._per_address.give_back(stream.share)
        self._metrics.streams_ended[how] += 1
        log.info(
            "stream closed",
            extra={
                "peer": stream.client,
                "how": how,
                "seconds": time.monotonic() - stream.opened,
                "position": stream.outbox.position,
                "id": stream.id,
                "closes": stream.id,
            },
        )

    def cut(self, stream_id: str, by: str) -> bool:
        """End one stream for the operator `by`. Return whether this process has the stream."""
        stream = self.open.get(stream_id)
        if stream is None:
            return False
        log.warning("stream cut", extra={"id": stream.id, "peer": stream.client, "by": by})
        stream.outbox.close(StreamCut("an operator has ended this stream"))
        return True

    def stop(self) -> None:
        """End every stream, and refuse new ones."""
        self._stopping = True
        message = "the server is stopping; reconnect with the last id"
        for stream in tuple(self.open.values()):
            stream.outbox.close(ServerStopping(message))

    def _end_at(self, stream: OpenStream, expires_at: float) -> None:
        """End the stream when its token expires, by the clock of the token's times."""
        left = expires_at - self._token_clock()
        if left <= 0:
            message = "the token has expired; reconnect with a new one and the last id"
            stream.outbox.close(TokenExpired(message))
            return
        # Timers do not notice when that clock is set. So check again after each heartbeat time,
        # with or without events (test_token_that_the_clock_passes_by_ends_its_stream).
        stream.expiry = asyncio.get_running_loop().call_later(
            min(left, self._recheck_seconds), self._end_at, stream, expires_at
        )
