"""A chunk: a run of consecutive events, encoded once and shared by all connections.

Promises: a chunk is immutable. Its bytes are the whole frames of exactly the events with
`start < seq <= end`, in increasing order. `after(cursor)` is a slice, never a new encoding.
`select(filter)` keeps `start` and `end`, because a filter hides events and not positions. A chunk
made from another chunk owns its bytes: it does not keep the other chunk in memory, and `nbytes`
counts all memory that it holds.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from sys import getsizeof
from typing import NamedTuple

from sse_labels.errors import BrokenPromise
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row, label_json
from sse_labels.protocol.sse import chunked, encode_frame, unchunked

#: Sizes in memory, measured on CPython 3.11 by `tracemalloc`, as the tests do.
#: A chunk without its events: the object, two arrays, two numbers, the headers of bytes and list.
CHUNK_BYTES = 448
#: An event without its bytes: seq and offset.
EVENT_BYTES = 16
#: What `select` needs of an event, without its texts: the key's tuple and its place in the list.
KEY_BYTES = 72
#: A cache entry without the chunk and the filter: the cache's key and its place.
KEPT_BYTES = 512


class FilterKey(NamedTuple):
    """The three fields that a filter compares."""

    src: str
    uri: str
    val: str


class Chunk:
    """Consecutive events with `start < seq <= end`, each encoded once.

    `start` is exclusive like every cursor: the chunk takes a consumer from position `start` to
    position `end`. Some seqs between the two may have no event.
    """

    __slots__ = (
        "_keys", "_nbytes", "_offsets", "end", "seqs", "start", "wire",
    )  # fmt: skip

    def __init__(
        self,
        start: int,
        end: int,
        seqs: array[int],
        frames: Sequence[str | bytes],
        keys: Sequence[FilterKey] | None,
    ) -> None:
        self.start = start
        self.end = end
        self.seqs = seqs
        self._keys = keys
        self._nbytes = 0
        #: The offset of each frame's start, and of the last frame's end. May start above 0.
        self._offsets = array("q", list(accumulate(map(len, frames), initial=0)))
        # HTTP's chunked coding is added here, once, and not for each connection.
        if frames and isinstance(frames[0], str):
            data = "".join(frames).encode("ascii")  # type: ignore[arg-type]
        else:
            data = b"".join(frames)  # type: ignore[arg-type]
        self.wire = chunked(data)

    def __len__(self) -> int:
        return len(self.seqs)

    def __repr__(self) -> str:
        return f"<Chunk ({self.start}, {self.end}] {len(self)} events>"

    @property
    def data(self) -> bytes:
        """The frames without HTTP's chunked coding."""
        return bytes(self._view())

    @property
    def nbytes(self) -> int:
        """The memory that this chunk holds, in bytes, exact enough for the bound of a ring."""
        if not self._nbytes:
            # Computed once: a string grows when it is encoded, and a ring's sum must stay right.
            keys = self._keys or ()
            texts = [key.uri for key in keys]
            # `_keys_of` keeps one string for all events of a source, and one for each value.
            texts += {key.src for key in keys} | {key.val for key in keys}
            each = EVENT_BYTES * len(self) + KEY_BYTES * len(keys)
            self._nbytes = CHUNK_BYTES + len(self.wire) + each + sum(map(getsizeof, texts))
        return self._nbytes

    def after(self, cursor: int, max_events: int | None = None) -> Chunk:
        """Return the events after `cursor`, at most `max_events` of them.

        Returns self when the part is the whole chunk. A part that `max_events` cuts short ends at
        its last event.
        """
        first = bisect_right(self.seqs, cursor)
        last = len(self) if max_events is None else min(len(self), first + max_events)
        if cursor <= self.start and last == len(self):
            return self
        part = Chunk.__new__(Chunk)
        part._nbytes = 0
        part.start = start = min(max(cursor, self.start), self.end)
        part.end = self.end
        if last < len(self):
            # Without events there is no last event, and no seq may be skipped.
            part.end = self.seqs[last - 1] if last > first else start
        part.seqs = self.seqs[first:last]
        part._keys = None if self._keys is None else self._keys[first:last]
        # Only slices: 10,000 clients may reconnect at once, each with another cursor.
        part._offsets = offsets = self._offsets[first : last + 1]
        base = self._offsets[0]
        part.wire = chunked(self._view()[offsets[0] - base : offsets[-1] - base])
        return part

    def count_after(self, cursor: int) -> int:
        """Return the number of events after `cursor`."""
        return len(self) - bisect_right(self.seqs, cursor)

    def select(self, filter: Filter | None) -> Chunk:
        """Return the chunk of the events that match `filter`, with the same `start` and `end`."""
        if filter is None:
            return self
        if self._keys is None:
            raise BrokenPromise(f"{self!r} was made without keys and cannot be filtered")
        matches = filter.matches
        kept = [i for i, key in enumerate(self._keys) if matches(key.src, key.uri, key.val)]
        if len(kept) == len(self):
            return self
        view, offsets, base = self._view(), self._offsets, self._offsets[0]
        return Chunk(
            self.start,
            self.end,
            array("q", [self.seqs[i] for i in kept]),
            [bytes(view[offsets[i] - base : offsets[i + 1] - base]) for i in kept],
            [self._keys[i] for i in kept],
        )

    def _view(self) -> memoryview:
        return unchunked(self.wire)

    def frames(self) -> list[bytes]:
        """Return the frame of each event."""
        view, base = self._view(), self._offsets[0]
        return [bytes(view[begin - base : end - base]) for begin, end in pairwise(self._offsets)]


def encode_rows(
    rows: Sequence[Row],
    *,
    start: int,
    end: int,
    with_keys: bool = False,
) -> Chunk:
    """Return the chunk of `rows`, which must be all settled rows in `(start, end]`, by id.

    `with_keys` keeps the fields that `select` needs. Pages of a backfill do not need them: their
    rows were filtered before.
    """
    return Chunk(
        start,
        end,
        array("q", [row.seq for row in rows]),
        [encode_frame(row.seq, label_json(*row.columns)) for row in rows],
        _keys_of((row.src, row.uri, row.val) for row in rows) if with_keys else None,
    )


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """Merge chunks that continue each other into one, so that few objects hold many events."""
    if len(chunks) == 1:
        return chunks[0]
    for left, right in pairwise(chunks):
        if left.end != right.start:
            raise BrokenPromise(f"{right!r} does not continue {left!r}")
    keys: list[FilterKey] = []
    for chunk in chunks:
        keys += chunk._keys or ()
    with_keys = all(chunk._keys is not None for chunk in chunks)
    return Chunk(
        chunks[0].start,
        chunks[-1].end,
        array("q", [seq for chunk in chunks for seq in chunk.seqs]),
        [frame for chunk in chunks for frame in chunk.frames()],
        _keys_of(keys) if with_keys else None,
    )


def after_position(chunks: Sequence[Chunk], position: int) -> list[Chunk]:
    """Return the part of `chunks` after `position`, which may be ahead of some of them.

    Raises BrokenPromise when the chunks do not continue `position`, or each other.
    """
    kept = []
    for chunk in chunks:
        if chunk.end <= position:
            continue
        if chunk.start > position:
            raise BrokenPromise(f"{chunk!r} does not continue position {position}")
        if chunk.start < position:
            chunk = chunk.after(position)
        position = chunk.end
        kept.append(chunk)
    return kept


def _keys_of(columns: Iterable[tuple[str, str, str]]) -> list[FilterKey]:
    """Return keys of (src, uri, val) that share one string for each source and each value.

    Not interned: CPython 3.12 never frees interned strings, and anybody may send new ones.
    """
    shared: dict[str, str] = {}
    return [
        FilterKey(shared.setdefault(src, src), uri, shared.setdefault(val, val))
        for src, uri, val in columns
    ]


def kept_nbytes(chunk: Chunk, filter: Filter | None) -> int:
    """Return about how many bytes a cache spends on `chunk` for this `filter`."""
    return KEPT_BYTES + chunk.nbytes + (0 if filter is None else filter.nbytes)
