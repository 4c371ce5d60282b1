"""A chunk: a run of consecutive events, encoded once and shared by all connections.

Promises: immutable; its bytes are the frames of exactly the events with
`start < seq <= end`, increasing, each whole; `after(cursor)` is a slice, never
a new encoding; `select(filter)` keeps `start` and `end`, because a filter
hides events and not positions. A chunk made of another one owns all that it
needs: it does not keep the other one in memory, and `nbytes` is what it holds.
Stands in the corridor between the store, which makes chunks out of rows, and
everything behind it, which only hands them on.
Does not belong here: where rows come from, who receives a chunk and when.
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

#: What a chunk takes beside its events: itself, two arrays, two numbers, the headers of its bytes
#: and of its list; and an event beside its bytes: seq and offset, and for `select` the key's tuple
#: and its place in the list. Measured on CPython 3.11 by `tracemalloc`, as the tests do.
CHUNK_BYTES = 448
EVENT_BYTES = 16
KEY_BYTES = 72
#: What a cache spends on an entry beside the chunk and the filter: the key and its place.
KEPT_BYTES = 512


class FilterKey(NamedTuple):
    """What a filter looks at."""

    src: str
    uri: str
    val: str


class Chunk:
    """Consecutive events with `start < seq <= end`, each encoded once.

    `start` is exclusive like every cursor: the chunk continues whoever stands at
    `start`, and moves them to `end`. Between the two may be seqs without an event.
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
        #: Where each frame begins, and where the last one ends; the first need not be at 0.
        self._offsets = array("q", list(accumulate(map(len, frames), initial=0)))
        # HTTP's chunked coding is made here, once, not per connection.
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
        """The frames without HTTP's chunked coding around them."""
        return bytes(self._view())

    @property
    def nbytes(self) -> int:
        """The memory that this chunk holds, in bytes, near enough to bound a ring by it."""
        if not self._nbytes:
            # Once: a string grows when it is wanted in UTF-8, and a ring's sum must stay right.
            keys = self._keys or ()
            texts = [key.uri for key in keys]
            # As `_keys_of` makes them: one object for all events of a source, or of a value.
            texts += {key.src for key in keys} | {key.val for key in keys}
            each = EVENT_BYTES * len(self) + KEY_BYTES * len(keys)
            self._nbytes = CHUNK_BYTES + len(self.wire) + each + sum(map(getsizeof, texts))
        return self._nbytes

    def after(self, cursor: int, max_events: int | None = None) -> Chunk:
        """Return the part that a consumer at `cursor` has not seen, its first `max_events`.

        Returns self when that is all of it; a part that is cut short ends at its last event.
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
            # Of no events at all there is no last one, and nothing may be passed over.
            part.end = self.seqs[last - 1] if last > first else start
        part.seqs = self.seqs[first:last]
        part._keys = None if self._keys is None else self._keys[first:last]
        # Slices alone: 10,000 clients come back at once, each from another place.
        part._offsets = offsets = self._offsets[first : last + 1]
        base = self._offsets[0]
        part.wire = chunked(self._view()[offsets[0] - base : offsets[-1] - base])
        return part

    def count_after(self, cursor: int) -> int:
        """Return how many events a consumer at `cursor` has not seen."""
        return len(self) - bisect_right(self.seqs, cursor)

    def select(self, filter: Filter | None) -> Chunk:
        """Return the events that `filter` lets through, over the same positions."""
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
    """Return the chunk of `rows`, which must be all of the settled rows in `(start, end]`, by id.

    `with_keys` keeps what `select` needs; pages of a backfill are made for one filter and do
    without. Such a filter has left rows out before.
    """
    return Chunk(
        start,
        end,
        array("q", [row.seq for row in rows]),
        [encode_frame(row.seq, label_json(*row.columns)) for row in rows],
        _keys_of((row.src, row.uri, row.val) for row in rows) if with_keys else None,
    )


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk of several that follow each other, so that few objects hold many events."""
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
    """Return what of `chunks` comes after `position`: a cursor may have been ahead of them.

    Raises BrokenPromise when they do not continue it, or each other.
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
    """Return keys of (src, uri, val) that share one object for each source and value.

    Not interned: CPython 3.12 never frees interned strings, and these are strangers'.
    """
    one: dict[str, str] = {}
    return [
        FilterKey(one.setdefault(src, src), uri, one.setdefault(val, val))
        for src, uri, val in columns
    ]


def kept_nbytes(chunk: Chunk, filter: Filter | None) -> int:
    """Return about how much memory a cache spends that keeps `chunk` for those who ask for it."""
    return KEPT_BYTES + chunk.nbytes + (0 if filter is None else filter.nbytes)
