"""Chunks: every slice, choice and merger of one is what encoding those rows anew would give."""

from __future__ import annotations

import http.client
import io
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sse_labels.errors import BrokenPromise
from sse_labels.feed.chunk import CHUNK_BYTES, Chunk, encode_rows, merge
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row

from support.eventsource import parse

SOURCES = ("did:plc:alice", "did:plc:bob")
URIS = ("at://did:plc:carol/post/1", "at://did:plc:carol/post/2", "https://example.com/ü\r\n")
VALUES = ("spam", "!hide", "\u2028\n\n")
CTS = "2026-01-01T00:00:00Z"

FILTERS = (
    Filter(values=frozenset({"spam"})),
    Filter(sources=frozenset({SOURCES[0]})),
    Filter(uri_prefixes=("at://did:plc:carol/",)),
    Filter(uris=frozenset({URIS[2]}), values=frozenset({"!hide", "spam"})),
    Filter(values=frozenset({"nobody uses it"})),
    Filter(uri_prefixes=("",)),
)


def make_row(seq: int, src: str = SOURCES[0], uri: str = URIS[0], val: str = "spam") -> Row:
    return Row(seq, src, uri, "", val, None, CTS, None, None)


@dataclass(frozen=True)
class Run:
    """All rows in `(start, end]`, as a page of the table gives them."""

    start: int
    end: int
    rows: list[Row]

    def encode(self) -> Chunk:
        return encode_rows(self.rows, start=self.start, end=self.end, with_keys=True)

    def after(self, cursor: int, max_events: int | None = None) -> Run:
        start = max(self.start, min(cursor, self.end))
        rows = [row for row in self.rows if row.seq > cursor]
        if max_events is None or len(rows) <= max_events:
            return Run(start, self.end, rows)
        # Cut short, it goes no further than what it shows.
        rows = rows[:max_events]
        return Run(start, rows[-1][0] if rows else start, rows)

    def select(self, filter: Filter) -> Run:
        kept = [row for row in self.rows if filter.matches(row.src, row.uri, row.val)]
        return Run(self.start, self.end, kept)

    def cut(self, cursors: list[int]) -> list[Run]:
        """The same run in consecutive pieces."""
        borders = [self.start, *sorted(cursors), self.end]
        return [
            Run(low, high, [row for row in self.rows if low < row.seq <= high])
            for low, high in pairwise(borders)
        ]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Runs with holes before, between and behind their rows, empty ones included."""
    start = draw(st.sampled_from([0, 1, 41, 2**40, 2**63 - 1000]))
    gaps = draw(st.lists(st.integers(1, 4), max_size=12))
    seq = start
    rows = []
    for gap in gaps:
        seq += gap
        rows.append(
            make_row(
                seq,
                draw(st.sampled_from(SOURCES)),
                draw(st.sampled_from(URIS)),
                draw(st.sampled_from(VALUES)),
            )
        )
    return Run(start, seq + draw(st.integers(0, 3)), rows)


def assert_same(made: Chunk, anew: Chunk) -> None:
    """Equal in all that a consumer can see, under every filter too."""
    assert (made.start, made.end, list(made.seqs)) == (anew.start, anew.end, list(anew.seqs))
    assert made.data == anew.data
    assert made.wire == anew.wire
    assert made.nbytes == anew.nbytes
    for filter in FILTERS:
        assert made.select(filter).data == anew.select(filter).data


def seqs_in(data: bytes) -> list[int]:
    """The seqs that a browser would receive."""
    parser = parse(data)
    assert not parser.inside_block
    return [int(event.last_event_id) for event in parser.events]


class TestEncoding:
    @settings(max_examples=60)
    @given(runs())
    def test_a_chunk_is_the_frames_of_its_rows_in_order(self, run: Run) -> None:
        chunk = run.encode()
        assert list(chunk.seqs) == seqs_in(chunk.data) == [row.seq for row in run.rows]
        assert (chunk.start, chunk.end, len(chunk)) == (run.start, run.end, len(run.rows))

    def test_a_chunk_without_events_still_moves_the_position(self) -> None:
        chunk = encode_rows([], start=5, end=9)
        assert (chunk.start, chunk.end, len(chunk), chunk.data) == (5, 9, 0, b"")

    def test_its_text_form_names_the_positions(self) -> None:
        assert repr(encode_rows([make_row(2)], start=1, end=7)) == "<Chunk (1, 7] 1 events>"


class TestAfter:
    @settings(max_examples=60)
    @given(runs())
    def test_after_any_cursor_it_is_what_encoding_the_rest_anew_gives(self, run: Run) -> None:
        chunk = run.encode()
        for cursor in range(run.start - 2, run.end + 3):
            assert_same(chunk.after(cursor), run.after(cursor).encode())

    @settings(max_examples=40)
    @given(runs())
    def test_after_any_cursor_its_first_events_are_what_encoding_those_anew_gives(
        self, run: Run
    ) -> None:
        chunk = run.encode()
        for cursor in range(run.start - 2, run.end + 3):
            for max_events in (*range(4), len(run.rows) - 1, len(run.rows), len(run.rows) + 1):
                if max_events >= 0:
                    part = chunk.after(cursor, max_events)
                    assert_same(part, run.after(cursor, max_events).encode())

    @settings(max_examples=30)
    @given(runs(), st.integers(1, 5))
    def test_page_by_page_it_is_read_to_its_end_and_nothing_is_left_out(
        self, run: Run, max_events: int
    ) -> None:
        chunk = run.encode()
        parts = [chunk.after(run.start, max_events)]
        while parts[-1].end < run.end:
            parts.append(chunk.after(parts[-1].end, max_events))
        assert max(map(len, parts)) <= max_events
        assert_same(merge(parts), chunk)

    @settings(max_examples=30)
    @given(runs())
    def test_what_comes_after_a_cursor_is_counted(self, run: Run) -> None:
        chunk = run.encode()
        for cursor in range(run.start - 2, run.end + 3):
            assert chunk.count_after(cursor) == len(run.after(cursor).rows)

    @settings(max_examples=30)
    @given(runs(), st.data())
    def test_a_slice_can_be_sliced_again(self, run: Run, data: st.DataObject) -> None:
        cursors = st.integers(run.start - 1, run.end + 1)
        first, second = data.draw(cursors), data.draw(cursors)
        assert_same(
            run.encode().after(first).after(second), run.after(first).after(second).encode()
        )

    def test_a_consumer_at_its_start_or_before_gets_the_chunk_itself(self) -> None:
        chunk = encode_rows([make_row(5), make_row(6)], start=4, end=6)
        assert chunk.after(4) is chunk
        assert chunk.after(0) is chunk

    def test_the_end_is_inclusive_and_what_lies_behind_a_hole_remains(self) -> None:
        chunk = encode_rows([make_row(5), make_row(9)], start=4, end=12)
        assert list(chunk.after(5).seqs) == [9]
        assert list(chunk.after(8).seqs) == [9]
        assert list(chunk.after(9).seqs) == []
        # All was seen, the position is not: seqs up to 12 are settled and have no event.
        assert (chunk.after(9).start, chunk.after(9).end) == (9, 12)
        assert (chunk.after(12).start, chunk.after(12).end) == (12, 12)
        assert (chunk.after(99).start, chunk.after(99).end) == (12, 12)


class TestSelect:
    @settings(max_examples=60)
    @given(runs(), st.sampled_from(FILTERS))
    def test_it_is_what_encoding_the_matching_rows_gives(self, run: Run, filter: Filter) -> None:
        selected = run.encode().select(filter)
        assert_same(selected, run.select(filter).encode())
        assert selected.wire == run.select(filter).encode().wire

    @settings(max_examples=30)
    @given(runs(), st.sampled_from(FILTERS), st.data())
    def test_slicing_and_selecting_agree_in_either_order(
        self, run: Run, filter: Filter, data: st.DataObject
    ) -> None:
        cursor = data.draw(st.integers(run.start - 1, run.end + 1))
        chunk = run.encode()
        assert_same(chunk.select(filter).after(cursor), chunk.after(cursor).select(filter))

    def test_without_a_filter_or_with_one_that_hides_nothing_no_bytes_are_made(self) -> None:
        chunk = encode_rows([make_row(1)], start=0, end=1, with_keys=True)
        assert chunk.select(None) is chunk
        assert chunk.select(FILTERS[0]) is chunk

    def test_a_filter_hides_events_and_not_positions(self) -> None:
        chunk = encode_rows([make_row(5), make_row(6)], start=4, end=8, with_keys=True)
        hidden = chunk.select(Filter(values=frozenset({"other"})))
        assert (hidden.start, hidden.end, len(hidden)) == (4, 8, 0)
        assert hidden.data == hidden.wire == b""

    def test_a_chunk_made_without_keys_breaks_its_promise_instead_of_guessing(self) -> None:
        chunk = encode_rows([make_row(5)], start=4, end=5)
        with pytest.raises(BrokenPromise, match="without keys"):
            chunk.select(FILTERS[0])
        assert chunk.select(None) is chunk


class TestMerge:
    @settings(max_examples=60)
    @given(runs(), st.data())
    def test_it_is_what_encoding_all_at_once_gives(self, run: Run, data: st.DataObject) -> None:
        cuts = data.draw(st.lists(st.integers(run.start, run.end), max_size=4))
        assert_same(merge([piece.encode() for piece in run.cut(cuts)]), run.encode())

    def test_chunks_with_a_hole_or_an_overlap_between_are_refused(self) -> None:
        first = encode_rows([make_row(1)], start=0, end=1)
        for start in (0, 2):
            second = encode_rows([make_row(3)], start=start, end=3)
            with pytest.raises(BrokenPromise, match="does not continue"):
                merge([first, second])

    def test_one_chunk_without_keys_leaves_the_whole_without(self) -> None:
        first = encode_rows([make_row(1)], start=0, end=1, with_keys=True)
        second = encode_rows([make_row(2)], start=1, end=2)
        with pytest.raises(BrokenPromise, match="without keys"):
            merge([first, second]).select(FILTERS[0])

    def test_the_parts_stay_as_they_were(self) -> None:
        parts = [encode_rows([make_row(n)], start=n - 1, end=n) for n in (1, 2, 3)]
        before = [(part.wire, list(part.seqs), part.start, part.end) for part in parts]
        merge(parts)
        assert [(part.wire, list(part.seqs), part.start, part.end) for part in parts] == before


class TestTogether:
    """Any slices, choices and mergers, one after the other."""

    @settings(max_examples=60)
    @given(runs(), st.data())
    def test_it_is_what_encoding_what_is_left_anew_gives(
        self, run: Run, data: st.DataObject
    ) -> None:
        chunk = run.encode()
        for _ in range(data.draw(st.integers(1, 4))):
            match data.draw(st.sampled_from(["after", "select", "merge"])):
                case "after":
                    cursor = data.draw(st.integers(run.start - 1, run.end + 1))
                    max_events = data.draw(st.none() | st.integers(0, 6))
                    chunk, run = chunk.after(cursor, max_events), run.after(cursor, max_events)
                case "select":
                    filter = data.draw(st.sampled_from(FILTERS))
                    chunk, run = chunk.select(filter), run.select(filter)
                case "merge":
                    seqs = [row.seq for row in run.rows[:-1]]
                    if seqs:
                        cut = data.draw(st.sampled_from(seqs))
                        head = chunk.after(run.start, seqs.index(cut) + 1)
                        chunk = merge([head, chunk.after(cut)])
            assert_same(chunk, run.encode())
            alone = [encode_rows([row], start=0, end=0).data for row in run.rows]
            assert chunk.data == b"".join(alone)
            assert unchunk(chunk.wire) == chunk.data


class TestWire:
    @settings(max_examples=60)
    @given(runs(), st.sampled_from(FILTERS))
    def test_it_is_http_chunked_coding_of_the_data(self, run: Run, filter: Filter) -> None:
        whole = run.encode()
        parts = [whole, whole.select(filter), whole.after((run.start + run.end) // 2)]
        for part in parts:
            assert unchunk(part.wire) == part.data
        # As a stream writes them: one after the other.
        joined = b"".join(part.wire for part in parts)
        assert unchunk(joined) == b"".join(part.data for part in parts)

    def test_an_empty_chunk_writes_nothing_because_an_empty_one_would_end_the_response(
        self,
    ) -> None:
        assert encode_rows([], start=0, end=3).wire == b""

    @pytest.mark.parametrize("events", [1, 3, 40, 700])
    def test_the_standard_library_reads_it_too(self, events: int) -> None:
        chunk = encode_rows([make_row(n) for n in range(1, events + 1)], start=0, end=events)
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        received: Any = _Wire(head + chunk.wire + b"0\r\n\r\n")
        response = http.client.HTTPResponse(received)
        response.begin()
        assert response.read() == chunk.data


class TestMemory:
    @pytest.mark.parametrize("events", [0, 1, 10, 500])
    @pytest.mark.parametrize("uri_length", [10, 80, 2000])
    def test_nbytes_is_near_what_the_chunk_holds(self, events: int, uri_length: int) -> None:
        rows = [
            make_row(n, uri=str(n).rjust(uri_length, "x"), val=VALUES[n % 3])
            for n in range(1, events + 1)
        ]
        chunk = encode_rows(rows, start=0, end=events, with_keys=True)
        held = held_bytes(chunk)
        assert held <= chunk.nbytes * 1.1
        assert chunk.nbytes <= held * 1.1 + CHUNK_BYTES

    @given(runs())
    def test_a_chunk_without_events_is_not_free(self, run: Run) -> None:
        # A ring of chunks that cost nothing would have no bound.
        assert Run(run.start, run.end, []).encode().nbytes >= CHUNK_BYTES


def unchunk(wire: bytes) -> bytes:
    """Decode RFC 9112, section 7.1, strictly: no extensions, no trailers, no last chunk."""
    body = b""
    while wire:
        line, rest = wire.split(b"\r\n", 1)
        assert line, "a chunk begins with its size"
        assert all(digit in b"0123456789abcdefABCDEF" for digit in line)
        size = int(line, 16)
        assert size > 0, "this chunk would end the response"
        assert rest[size : size + 2] == b"\r\n"
        body += rest[:size]
        wire = rest[size + 2 :]
    return body


def held_bytes(chunk: Chunk) -> int:
    """What the objects of this chunk alone take, by the interpreter's own account."""
    keys = chunk._keys or []
    parts = [chunk, chunk.wire, chunk.seqs, chunk._offsets, keys, *keys]
    texts = {id(text): text for key in keys for text in key}
    return sum(map(sys.getsizeof, [*parts, *texts.values()]))


class _Wire:
    """As much of a socket as `http.client` reads from."""

    def __init__(self, received: bytes) -> None:
        self._received = received

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._received)
