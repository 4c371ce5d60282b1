"""The ring: holds the recent chunks, so that a consumer catches up without the database.

Promises: its chunks continue each other without a gap up to the head. They hold at most `max_bytes`
(or one chunk, if that chunk alone is larger). Pages made for consumers hold at most an eighth of
`max_bytes` more. Only the sequencer appends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator

from sse_labels.errors import BrokenPromise
from sse_labels.feed.chunk import Chunk, kept_nbytes, merge
from sse_labels.protocol.filters import Filter

#: This many small chunks at the new end are merged into one. So the ring of a quiet stream holds
#: hundreds of chunks and not a hundred thousand.
MERGE_COUNT = 64
#: A chunk with fewer events than this is small. A merged chunk leaves the ring as a whole:
#: 64 x 63 events are about 3 MB.
SMALL_EVENTS = 64

#: Pages are kept for the next consumer, up to this fraction of `max_bytes`: one eighth.
PAGES_SHARE = 8


class Ring:
    """Recent chunks, oldest first. Covers every cursor from `start` up to `end`, the head."""

    def __init__(self, start: int, max_bytes: int) -> None:
        self._chunks: deque[Chunk] = deque()
        #: The number of small chunks at the new end.
        self._small_count = 0
        self._max_bytes = max_bytes
        self._pages: OrderedDict[tuple[int, int, Filter | None], Chunk] = OrderedDict()
        self._pages_nbytes = 0
        self.nbytes = 0
        self.start = start
        self.end = start

    def __len__(self) -> int:
        return len(self._chunks)

    def append(self, chunk: Chunk) -> None:
        """Add the chunk that continues the newest one. When the ring is full, drop the oldest."""
        if chunk.start != self.end:
            raise BrokenPromise(f"{chunk!r} does not continue the ring, which ends at {self.end}")
        self._chunks.append(chunk)
        self.end = chunk.end
        self.nbytes += chunk.nbytes
        self._small_count = self._small_count + 1 if len(chunk) < SMALL_EVENTS else 0
        if self._small_count == MERGE_COUNT:
            self._merge_small()
        while self.nbytes > self._max_bytes and len(self._chunks) > 1:
            self._drop_oldest()
        self._small_count = min(self._small_count, len(self._chunks))

    def forget_below(self, floor: int) -> None:
        """Drop all events below `floor`. The head stays the same."""
        start = min(floor - 1, self.end)
        if start <= self.start:
            return
        while self._chunks and self._chunks[0].end <= start:
            self._drop_oldest()
        if self._chunks:
            oldest = self._chunks[0]
            kept = self._chunks[0] = oldest.after(start)
            self.nbytes += kept.nbytes - oldest.nbytes
        self.start = start
        self._small_count = min(self._small_count, len(self._chunks))
        for key in [key for key in self._pages if key[0] < start]:
            self._pages_nbytes -= kept_nbytes(self._pages.pop(key), key[2])

    def covers(self, cursor: int) -> bool:
        """Return whether the ring holds all events after `cursor`. True beyond the head."""
        return cursor >= self.start

    def count_after(self, cursor: int, enough: int) -> int:
        """Return the number of events after `cursor`. Counting stops above `enough`."""
        count = 0
        for chunk in self._from(cursor):
            count += chunk.count_after(cursor)
            if count > enough:
                break
        return count

    def after(self, cursor: int) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`, which must be covered. The first may be a slice."""
        for whole in self._from(cursor):
            chunk = whole.after(cursor)
            if chunk.end > cursor:
                yield chunk

    def page(self, cursor: int, max_events: int, filter: Filter | None) -> Chunk:
        """Return the next `max_events` events after `cursor`, without those that `filter` hides.

        Consumers that ask for the same full page share it: after a restart many have the same
        cursor. The result is one page at most, because a consumer that does not read holds it.
        """
        key = (cursor, max_events, filter)
        page = self._pages.get(key)
        if page is not None:
            return page
        parts: list[Chunk] = []
        events = 0
        for whole in self._from(cursor):
            part = whole.after(cursor, max_events - events)
            if part.end > cursor:
                parts.append(part)
                events += len(part)
            if events >= max_events:
                break
        page = merge(parts).select(filter)
        if events >= max_events:
            self._pages[key] = page
            self._pages_nbytes += kept_nbytes(page, filter)
            while self._pages_nbytes > self._max_bytes // PAGES_SHARE:
                (_, _, oldest), left = self._pages.popitem(last=False)
                self._pages_nbytes -= kept_nbytes(left, oldest)
        return page

    def _from(self, cursor: int) -> Iterator[Chunk]:
        """Yield the chunk that contains `cursor`, and the chunks after it."""
        if not self.covers(cursor):
            raise BrokenPromise(f"the ring starts at {self.start}, after cursor {cursor}")
        first = max(0, bisect_right(self._chunks, cursor, key=_start) - 1)
        for index in range(first, len(self._chunks)):
            yield self._chunks[index]

    def _drop_oldest(self) -> None:
        oldest = self._chunks.popleft()
        self.nbytes -= oldest.nbytes
        self.start = oldest.end

    def _merge_small(self) -> None:
        small = [self._chunks.pop() for _ in range(self._small_count)][::-1]
        merged = merge(small)
        self.nbytes += merged.nbytes - sum(chunk.nbytes for chunk in small)
        self._chunks.append(merged)
        self._small_count = 0


def _start(chunk: Chunk) -> int:
    return chunk.start
