"""A chunk: a run of consecutive events, encoded once and shared by all connections.

Promises: immutable; its bytes are the frames of exactly the events with
`start < seq <= end`, increasing, each whole; `after(cursor)` is a slice, never
a new encoding; `select(narrowed)` keeps `start` and `end`, because a filter
hides events and not positions.
Stands in the corridor between the store, which makes chunks out of rows, and
everything behind it, which only hands them on.
Does not belong here: where rows come from, who receives a chunk and when.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from sys import intern
from typing import Any, NamedTuple

from sse_labels.errors import BrokenPromise
from sse_labels.filters import Filter
from sse_labels.labels import label_json
from sse_labels.sse import decode_frame, encode_frame
from sse_labels.xrpc import encode_labels

#: One row as the SQL blocks return it: id, src, uri, cid, val, neg, cts, exp, sig.
Row = tuple[Any, ...]

#: What an event costs in memory beside its bytes and its URI: seq and offset
#: (8 each), the key's tuple (64) and the URI's string header (49), by
#: `sys.getsizeof` on CPython 3.11; src and val are interned.
EVENT_OVERHEAD_BYTES = 129
#: What a cache spends on an entry beside the chunk's events and the filter: the chunk itself, the
#: key and its place. Without it, pages of which a filter hides all would cost nothing.
KEPT_BYTES = 1024


class Key(NamedTuple):
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
        "_chosen", "_keys", "_messages", "_offsets", "_whole", "end", "seqs", "start", "wire",
    )  # fmt: skip

    def __init__(
        self,
        start: int,
        end: int,
        seqs: array[int],
        frames: Sequence[str | bytes],
        keys: Sequence[Key] | None,
    ) -> None:
        self.start = start
        self.end = end
        self.seqs = seqs
        self._keys = keys
        #: The events as WebSocket messages, and where each begins, once somebody has asked.
        self._messages: tuple[bytes, array[int]] | None = None
        #: What this is a part of, and the place of its first event there.
        self._whole: tuple[Chunk, int] | None = None
        #: What this was chosen from by a filter, and the places of its events there.
        self._chosen: tuple[Chunk, list[int]] | None = None
        offsets = array("q", [0])
        total = 0
        for frame in frames:
            total += len(frame)
            offsets.append(total)
        #: Where each frame begins, and where the last one ends; the first need not be at 0.
        self._offsets = offsets
        # HTTP/1.1 chunked coding (RFC 9112, section 7.1) is made here, once, not per connection.
        if frames and isinstance(frames[0], str):
            data = "".join(frames).encode("ascii")  # type: ignore[arg-type]
        else:
            data = b"".join(frames)  # type: ignore[arg-type]
        self.wire = _framed(data)

    def __len__(self) -> int:
        return len(self.seqs)

    def __repr__(self) -> str:
        return f"<Chunk ({self.start}, {self.end}] {len(self)} events>"

    @property
    def data(self) -> bytes:
        """The frames without HTTP's chunked coding around them."""
        return bytes(self._view())

    @property
    def messages(self) -> bytes:
        """The events as WebSocket messages of `subscribeLabels`.

        Encoded out of the frames when the first consumer asks, once for all of them and for all
        parts: whoever reads Server-Sent Events alone pays nothing, and both carry the same.
        """
        if self._whole is not None:
            whole, first = self._whole
            data, offsets = whole._encoded()
            return data[offsets[first] : offsets[first + len(self)]]
        return self._encoded()[0]

    def _all_messages(self) -> tuple[bytes, array[int]]:
        """Return the messages of all events and where each begins, a part's from its whole."""
        if self._whole is None:
            return self._encoded()
        whole, first = self._whole
        data, begins = whole._encoded()
        return data, begins[first : first + len(self) + 1]

    def _encoded(self) -> tuple[bytes, array[int]]:
        if self._messages is None:
            offsets, messages, total = array("q", [0]), [], 0
            if self._chosen is None:
                messages = [
                    encode_labels(*decode_frame(frame)) for frame in self._frames(0, len(self))
                ]
            else:
                # Encoded once for all filters, too.
                whole, places = self._chosen
                data, begins = whole._all_messages()
                messages = [data[begins[place] : begins[place + 1]] for place in places]
            for message in messages:
                total += len(message)
                offsets.append(total)
            self._messages = b"".join(messages), offsets
        return self._messages

    @property
    def nbytes(self) -> int:
        """The memory that this chunk holds, in bytes, near enough to bound a ring by it."""
        uris = 0 if self._keys is None else sum(len(key.uri) for key in self._keys)
        return len(self.wire) + uris + EVENT_OVERHEAD_BYTES * (len(self) + 1)

    def after(self, cursor: int, max_events: int | None = None) -> Chunk:
        """Return the part that a consumer at `cursor` has not seen, its first `max_events`.

        Returns self when that is all of it; a part that is cut short ends at its last event.
        """
        first = bisect_right(self.seqs, cursor)
        last = len(self) if max_events is None else min(len(self), first + max_events)
        if cursor <= self.start and last == len(self):
            return self
        part = Chunk.__new__(Chunk)
        part._messages = part._chosen = None
        part._whole = (self, first) if self._whole is None else (
            self._whole[0], self._whole[1] + first
        )  # fmt: skip
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
        part.wire = _framed(self._view()[offsets[0] - base : offsets[-1] - base])
        return part

    def count_after(self, cursor: int) -> int:
        """Return how many events a consumer at `cursor` has not seen."""
        return len(self) - bisect_right(self.seqs, cursor)

    def select(self, narrowed: Filter | None) -> Chunk:
        """Return the events that `narrowed` lets through, over the same positions."""
        if narrowed is None:
            return self
        if self._keys is None:
            raise BrokenPromise(f"{self!r} was made without keys and cannot be filtered")
        matches = narrowed.matches
        kept = [i for i, key in enumerate(self._keys) if matches(key.src, key.uri, key.val)]
        if len(kept) == len(self):
            return self
        view, offsets, base = self._view(), self._offsets, self._offsets[0]
        part = Chunk(
            self.start,
            self.end,
            array("q", [self.seqs[i] for i in kept]),
            [bytes(view[offsets[i] - base : offsets[i + 1] - base]) for i in kept],
            [self._keys[i] for i in kept],
        )
        part._chosen = self, kept
        return part

    def _view(self) -> memoryview:
        head = self.wire.find(b"\n") + 1
        return memoryview(self.wire)[head : head + self._offsets[-1] - self._offsets[0]]

    def _frames(self, first: int, last: int) -> list[bytes]:
        view, base = self._view(), self._offsets[0]
        return [
            bytes(view[begin - base : end - base])
            for begin, end in pairwise(self._offsets[first : last + 1])
        ]


def _framed(data: bytes | memoryview) -> bytes:
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if data else b""


def encode_rows(
    rows: Sequence[Row],
    *,
    start: int,
    end: int,
    narrowed: Filter | None = None,
    with_keys: bool = False,
) -> Chunk:
    """Return the chunk of `rows`, which must be all of the settled rows in `(start, end]`, by id.

    `narrowed` leaves rows out before they are encoded. `with_keys` keeps what
    `select` needs; pages of a backfill are read for one filter and do without.
    """
    if narrowed is not None:
        matches = narrowed.matches
        rows = [row for row in rows if matches(row[1], row[2], row[4])]
    return Chunk(
        start,
        end,
        array("q", [row[0] for row in rows]),
        [encode_frame(row[0], label_json(*row[1:])) for row in rows],
        [Key(intern(row[1]), row[2], intern(row[4])) for row in rows] if with_keys else None,
    )


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk of several that follow each other, so that few objects hold many events."""
    if len(chunks) == 1:
        return chunks[0]
    for left, right in pairwise(chunks):
        if left.end != right.start:
            raise BrokenPromise(f"{right!r} does not continue {left!r}")
    seqs = array("q")
    frames: list[bytes] = []
    keys: list[Key] = []
    for chunk in chunks:
        seqs.extend(chunk.seqs)
        frames.extend(chunk._frames(0, len(chunk)))
        keys.extend(chunk._keys or ())
    with_keys = all(chunk._keys is not None for chunk in chunks)
    return Chunk(chunks[0].start, chunks[-1].end, seqs, frames, keys if with_keys else None)


def kept_nbytes(chunk: Chunk, narrowed: Filter | None) -> int:
    """Return about how much memory a cache spends that keeps `chunk` for those who ask for it."""
    return KEPT_BYTES + chunk.nbytes + (0 if narrowed is None else narrowed.nbytes)
