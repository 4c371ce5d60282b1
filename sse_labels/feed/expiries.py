"""Expiries: the interface through which an outbox gets notices of expired labels.

`expiry/reader.py` implements it. The corridor does not import that room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sse_labels.protocol.notice import Notice


class Expiries(Protocol):
    """The notices of expired labels for one stream."""

    def begin(self, on_news: Callable[[], None]) -> None:
        """Collect notices from now on. Call `on_news` whenever `take` may return more."""

    def take(self, most: int) -> list[Notice]:
        """Return at most `most` of the waiting notices, in order."""

    def leave(self) -> None:
        """Collect no more notices."""

    def __len__(self) -> int:
        """Return the number of waiting notices."""
