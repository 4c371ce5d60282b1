"""The ring against a plain list: what it covers is all there, what it holds is bounded."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sse_labels.errors import BrokenPromise
from sse_labels.feed import ring as ring_module
from sse_labels.feed.chunk import Chunk, encode_rows, kept_nbytes
from sse_labels.feed.ring import MERGE_COUNT, SMALL_EVENTS, Ring
from sse_labels.protocol.label import Row

PLENTY = 2**30


def make_chunk(start: int, seqs: list[int], end: int | None = None) -> Chunk:
    rows = [
        Row(seq, "did:plc:a", f"at://b/{seq}", "", "spam", None, "t", None, None) for seq in seqs
    ]
    last = seqs[-1] if seqs else start
    return encode_rows(rows, start=start, end=last if end is None else end, with_keys=True)


def fill(ring: Ring, chunks: int, events: int = 1) -> None:
    for _ in range(chunks):
        ring.append(make_chunk(ring.end, [ring.end + 1 + n for n in range(events)]))


def seqs_after(ring: Ring, cursor: int) -> list[int]:
    """All seqs that the ring yields after a cursor; its chunks must continue each other."""
    position = cursor
    seqs: list[int] = []
    for chunk in ring.after(cursor):
        assert chunk.start <= position if position == cursor else chunk.start == position
        assert chunk.end > position
        position = chunk.end
        seqs += chunk.seqs
    assert position == max(cursor, ring.end)
    return seqs


class TestContinuity:
    def test_a_new_ring_covers_its_start_and_yields_nothing(self) -> None:
        ring = Ring(41, PLENTY)
        assert (ring.start, ring.end, len(ring), ring.nbytes) == (41, 41, 0, 0)
        assert not ring.covers(40)
        assert ring.covers(41)
        assert list(ring.after(41)) == []

    @pytest.mark.parametrize("start", [0, 9, 11, 12])
    def test_a_chunk_that_does_not_continue_the_head_is_refused(self, start: int) -> None:
        ring = Ring(0, PLENTY)
        ring.append(make_chunk(0, [1, 5], 10))
        with pytest.raises(BrokenPromise, match="does not continue"):
            ring.append(make_chunk(start, [13]))
        # And left no trace.
        assert (ring.end, len(ring), seqs_after(ring, 0)) == (10, 1, [1, 5])

    def test_a_cursor_before_the_start_is_refused_and_not_served_with_a_hole(self) -> None:
        ring = Ring(5, PLENTY)
        ring.append(make_chunk(5, [6]))
        with pytest.raises(BrokenPromise, match="starts at 5"):
            next(ring.after(4))

    def test_a_cursor_beyond_the_head_is_covered_and_has_nothing_to_come(self) -> None:
        ring = Ring(5, PLENTY)
        ring.append(make_chunk(5, [6]))
        assert ring.covers(1000)
        assert list(ring.after(1000)) == []

    def test_the_holes_at_a_chunks_end_belong_to_it(self) -> None:
        ring = Ring(0, PLENTY)
        ring.append(make_chunk(0, [1, 2], 4))
        ring.append(make_chunk(4, [], 8))
        ring.append(make_chunk(8, [9]))
        assert [seqs_after(ring, cursor) for cursor in range(10)] == [
            [1, 2, 9],
            [2, 9],
            *[[9]] * 7,
            [],
        ]

    def test_a_consumer_at_a_chunks_border_shares_the_chunk_itself(self) -> None:
        ring = Ring(0, PLENTY)
        chunks = [make_chunk(0, [1, 2]), make_chunk(2, [3]), make_chunk(3, [4, 5])]
        for chunk in chunks:
            ring.append(chunk)
        assert [chunk is same for chunk, same in zip(ring.after(2), chunks[1:], strict=True)]
        assert list(ring.after(0)) == chunks


class TestBound:
    def test_the_oldest_chunks_leave_and_no_more_of_them_than_must(self) -> None:
        size = make_chunk(0, [1]).nbytes
        ring = Ring(0, 3 * size)
        fill(ring, 3)
        assert (ring.start, len(ring), ring.nbytes) == (0, 3, 3 * size)
        fill(ring, 1)
        assert (ring.start, len(ring), ring.nbytes) == (1, 3, 3 * size)
        assert not ring.covers(0)
        assert seqs_after(ring, 1) == [2, 3, 4]

    def test_a_chunk_larger_than_the_bound_stays_alone(self) -> None:
        ring = Ring(0, 10)
        fill(ring, 1, events=50)
        assert len(ring) == 1
        fill(ring, 1, events=50)
        assert (len(ring), ring.start, ring.end) == (1, 50, 100)
        assert seqs_after(ring, 70) == list(range(71, 101))

    def test_chunks_without_events_are_bounded_too(self) -> None:
        ring = Ring(0, 1000)
        for _ in range(200):
            ring.append(make_chunk(ring.end, [], ring.end + 1))
            assert ring.nbytes <= 1000 or len(ring) == 1


class TestFloor:
    def test_what_lies_below_it_is_gone_and_the_rest_is_there(self) -> None:
        for floor in range(1, 14):
            ring = Ring(0, PLENTY)
            for start in (0, 3, 6, 9):
                ring.append(make_chunk(start, [start + 1, start + 3]))
            ring.forget_below(floor)
            assert (ring.start, ring.end) == (min(floor - 1, 12), 12)
            assert not ring.covers(ring.start - 1)
            kept = [seq for seq in (1, 3, 4, 6, 7, 9, 10, 12) if seq >= floor]
            assert seqs_after(ring, ring.start) == kept
            ring.append(make_chunk(12, [13]))
            assert seqs_after(ring, ring.start) == [*kept, 13]

    def test_one_that_sinks_or_stays_changes_nothing(self) -> None:
        ring = Ring(5, PLENTY)
        fill(ring, 3)
        before = list(ring.after(5))
        for floor in (1, 5, 6):
            ring.forget_below(floor)
            assert [one is other for one, other in zip(ring.after(5), before, strict=True)]

    def test_pages_that_begin_below_it_are_dropped_and_not_counted(self) -> None:
        ring = Ring(0, PLENTY)
        fill(ring, 10, events=10)
        for cursor in range(0, 90, 10):
            ring.page(cursor, 5, None)
        ring.forget_below(41)
        assert sorted(cursor for cursor, _, _ in ring._pages) == [40, 50, 60, 70, 80]
        assert ring._pages_nbytes == sum(kept_nbytes(page, None) for page in ring._pages.values())


class TestMerging:
    def test_a_quiet_streams_ring_is_few_chunks(self) -> None:
        ring = Ring(0, PLENTY)
        fill(ring, MERGE_COUNT - 1)
        assert len(ring) == MERGE_COUNT - 1
        fill(ring, 1)
        assert len(ring) == 1
        fill(ring, 9 * MERGE_COUNT)
        assert len(ring) == 10
        assert seqs_after(ring, 0) == list(range(1, 10 * MERGE_COUNT + 1))

    def test_large_chunks_are_left_as_they_are(self) -> None:
        ring = Ring(0, PLENTY)
        fill(ring, MERGE_COUNT - 1)
        fill(ring, 1, events=SMALL_EVENTS)
        fill(ring, MERGE_COUNT - 1)
        assert len(ring) == 2 * MERGE_COUNT - 1
        fill(ring, 1)
        assert len(ring) == MERGE_COUNT + 1

    def test_a_reader_between_two_chunks_goes_on_after_they_were_merged(self) -> None:
        ring = Ring(0, PLENTY)
        fill(ring, MERGE_COUNT - 1, events=3)
        before = [seqs_after(ring, cursor) for cursor in range(ring.end)]
        fill(ring, 1, events=3)
        assert len(ring) == 1
        new = list(range(ring.end - 2, ring.end + 1))
        assert [seqs_after(ring, cursor) for cursor in range(ring.end - 3)] == [
            seqs + new for seqs in before
        ]

    def test_eviction_forgets_the_small_chunks_that_left(self) -> None:
        size = make_chunk(1000, [1001]).nbytes
        ring = Ring(1000, 10 * size)
        fill(ring, 3 * MERGE_COUNT)
        assert ring.nbytes <= 10 * size
        assert len(ring) == 10
        assert seqs_after(ring, ring.start) == list(range(ring.start + 1, ring.end + 1))


class RingMachine(RuleBasedStateMachine):
    """A ring with small limits beside a list that forgets nothing."""

    def __init__(self) -> None:
        super().__init__()
        # Few events per chunk and few chunks per merger, so that short runs reach all of it.
        self._limits = mock.patch.multiple(ring_module, MERGE_COUNT=4, SMALL_EVENTS=3)
        self._limits.start()

    def teardown(self) -> None:
        self._limits.stop()

    @initialize(start=st.integers(0, 5), max_bytes=st.sampled_from([0, 500, 1500, 5000, PLENTY]))
    def begin(self, start: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.ring = Ring(start, max_bytes)
        self.head = start
        self.all: list[int] = []

    @rule(gaps=st.lists(st.integers(1, 3), max_size=5), holes_at_end=st.integers(0, 2))
    def publish(self, gaps: list[int], holes_at_end: int) -> None:
        seqs = []
        seq = self.head
        for gap in gaps:
            seq += gap
            seqs.append(seq)
        chunk = make_chunk(self.head, seqs, seq + holes_at_end)
        if chunk.end == chunk.start:
            return
        before = self.ring.nbytes
        start = self.ring.start
        self.ring.append(chunk)
        self.all += seqs
        self.head = chunk.end
        # Nothing leaves while there is room for all.
        if before + chunk.nbytes <= self.max_bytes:
            assert self.ring.start == start

    @rule(data=st.data())
    def forget_below(self, data: st.DataObject) -> None:
        floor = data.draw(st.integers(1, self.head + 2))
        start = self.ring.start
        self.ring.forget_below(floor)
        assert self.ring.start == max(start, min(floor - 1, self.head))

    @precondition(lambda self: self.head > 0)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        wrong = data.draw(st.integers(0, self.head + 3).filter(lambda start: start != self.head))
        with pytest.raises(BrokenPromise):
            self.ring.append(make_chunk(wrong, [wrong + 1]))

    @invariant()
    def everything_covered_is_there(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert self.ring.end == self.head
        for cursor in range(max(0, self.ring.start - 2), self.head + 3):
            assert self.ring.covers(cursor) == (cursor >= self.ring.start)
            if self.ring.covers(cursor):
                assert seqs_after(self.ring, cursor) == [seq for seq in self.all if seq > cursor]

    @invariant()
    def its_memory_is_counted_and_bounded(self) -> None:
        if not hasattr(self, "ring"):
            return
        chunks = list(self.ring.after(self.ring.start))
        assert self.ring.nbytes == sum(chunk.nbytes for chunk in chunks)
        assert len(self.ring) == len(chunks)
        assert self.ring.nbytes <= self.max_bytes or len(chunks) <= 1
        # One that was merged covers four seqs at least, and may be all holes.
        small = [len(chunk) < 3 and chunk.end - chunk.start < 4 for chunk in chunks]
        assert small[-4:] != [True] * 4


TestAgainstAList = RingMachine.TestCase
TestAgainstAList.settings = settings(max_examples=40, stateful_step_count=20)
