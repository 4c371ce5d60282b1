"""The queue of an outbox: holds live chunks, and its bound is a number of events.

A bound in chunks would never be reached, because one chunk may hold many events.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sse_labels.feed.chunk import Chunk, merge


class ChunkQueue(asyncio.Queue[Chunk]):
    """An `asyncio.Queue` of chunks whose size and bound are counted in events.

    Putting a chunk into a full queue raises QueueFull. So the queue holds fewer than `maxsize`
    events plus one chunk. Chunks without events are merged into one: otherwise a filter that hides
    every event would fill the queue without bound.
    """

    _queue: deque[Chunk]

    def _init(self, maxsize: int) -> None:
        self._queue = deque()
        self._events = 0

    def _put(self, item: Chunk) -> None:
        if not item.seqs and self._queue:
            last = self._queue[-1]
            if not last.seqs and last.end == item.start:
                item = merge([self._queue.pop(), item])
        self._queue.append(item)
        self._events += len(item)

    def _get(self) -> Chunk:
        item = self._queue.popleft()
        self._events -= len(item)
        return item

    def qsize(self) -> int:
        """Return the number of waiting events."""
        return self._events
