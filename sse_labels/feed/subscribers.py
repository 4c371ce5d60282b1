"""The subscribers of the sequencer: each receives every new chunk, reduced by its filter."""

from __future__ import annotations

from typing import Protocol

from sse_labels.feed.chunk import Chunk
from sse_labels.protocol.filters import Filter


class Subscriber(Protocol):
    """Receives chunks. No method may await or raise; each may unsubscribe."""

    def push(self, chunk: Chunk) -> None:
        """Take the chunk that continues the previous one."""

    def fall_back(self) -> None:
        """Read on from the table: the next chunk does not continue the pushed ones."""


class Subscribers:
    """The subscribers in groups: each filter selects from a chunk once."""

    def __init__(self) -> None:
        self._groups: dict[Filter | None, dict[Subscriber, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, subscriber: Subscriber, filter: Filter | None) -> None:
        """Push every chunk from now on, reduced to the events that match `filter`."""
        self._groups.setdefault(filter, {})[subscriber] = None

    def remove(self, subscriber: Subscriber, filter: Filter | None) -> None:
        """Push no more chunks. If the subscriber was not added, nothing happens."""
        group = self._groups.get(filter)
        if group is not None:
            group.pop(subscriber, None)
            if not group:
                del self._groups[filter]

    def push(self, chunk: Chunk) -> None:
        """Push the chunk to every subscriber, without an await."""
        for filter, group in tuple(self._groups.items()):
            part = chunk.select(filter)
            # A copy: a subscriber that is too slow unsubscribes during its `push`.
            for subscriber in tuple(group):
                subscriber.push(part)

    def fall_back(self) -> None:
        """Tell every subscriber that the next chunk does not continue the pushed ones."""
        for group in tuple(self._groups.values()):
            for subscriber in tuple(group):
                subscriber.fall_back()
