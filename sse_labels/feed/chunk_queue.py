"""A queue of chunks whose bound is counted in events.

With chunks, a bound that counts items would never be reached.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sse_labels.feed.chunk import Chunk, merge


class ChunkQueue(asyncio.Queue[Chunk]):
    """An `asyncio.Queue` of chunks whose size and bound are counted in events.

    A put that finds it full raises QueueFull, so it holds less than `maxsize` events plus one
    chunk. Chunks without events become one, else a filter that hides all made them unbounded.
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
        """Return the number of events that wait."""
        return self._events
