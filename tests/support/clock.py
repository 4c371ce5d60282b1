"""A clock that a test sets, so that no test waits for a time."""

from __future__ import annotations

from datetime import UTC, datetime

from support.server import Server

#: The first time of each clock.
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()


class Clock:
    """Returns the time that was set, in seconds since 1970."""

    def __init__(self, server: Server | None = None) -> None:
        """With `server`, become the clock of its expiry."""
        self.now = NOON
        self._server = server
        if server is not None:
            server.app.expiry.clock = self

    def __call__(self) -> float:
        return self.now

    def set(self, seconds: float) -> None:
        """Set the time to `seconds` after noon."""
        self.now = NOON + seconds
        if self._server is not None:
            self._server.app.expiry.wake()


def at(seconds: float, offset: str = "Z") -> str:
    """A datetime of the AT Protocol, `seconds` after noon, written with an offset."""
    minutes = 0
    if offset != "Z":
        sign = -1 if offset[0] == "-" else 1
        minutes = sign * (60 * int(offset[1:3]) + int(offset[4:6]))
    there = datetime.fromtimestamp(NOON + seconds + 60 * minutes, UTC)
    return there.replace(tzinfo=None).isoformat(timespec="milliseconds") + offset
