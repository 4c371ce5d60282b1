"""One consumer's way from its cursor to live, with time and every race under the test's control.

The sequencer and its ring are the real ones, `publish` is called by the tests; the database is a
list behind a gate. Time is virtual: it jumps when nobody has anything to do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sse_labels.errors import (
    BrokenPromise,
    ConsumerTooSlow,
    DatabaseUnavailable,
    SchemaError,
    ServerStopping,
)
from sse_labels.feed.chunk import Chunk, encode_rows
from sse_labels.feed.chunk_queue import ChunkQueue
from sse_labels.feed.outbox import Outbox
from sse_labels.feed.ring import Ring
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.steps import (
    CaughtUp,
    Events,
    Expired,
    Outdated,
    Silence,
    SnapshotComplete,
    Step,
)
from sse_labels.feed.store import Page, Snapshot, TableState
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row
from sse_labels.protocol.notice import Notice

from support.virtual_time import virtual_time

PLENTY = 2**30
HEARTBEAT_SECONDS = 15.0
ONLY_SPAM = Filter(values=frozenset({"spam"}))

Steps = AsyncGenerator[Step, None]


def now() -> float:
    return asyncio.get_running_loop().time()


def make_row(seq: int) -> Row:
    """Odd seqs are spam, even ones are porn."""
    val = "spam" if seq % 2 else "porn"
    return Row(seq, "did:plc:a", f"at://b/{seq}", "", val, None, "t", None, None)


class Bench:
    """A sequencer, a table behind a gate, and outboxes on them."""

    def __init__(
        self,
        *,
        history: int = 0,
        page_max_events: int = 4,
        ring_max_bytes: int = PLENTY,
    ) -> None:
        """`history` events stand in the table before the ring begins."""
        self.page_max_events = page_max_events
        self.metrics = Metrics()
        store: Any = self
        self.sequencer = Sequencer(
            store,
            self.metrics,
            page_max_events=page_max_events,
            ring_max_bytes=ring_max_bytes,
            poll_seconds=1,
            gather_seconds=0,
        )
        self.sequencer.ring = Ring(history, ring_max_bytes)
        self.table = [make_row(seq) for seq in range(1, history + 1)]
        self.floor = 1
        #: The cursors of all reads so far.
        self.reads: list[int] = []
        self.cancelled_reads: list[int] = []
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.parked = asyncio.Event()

    async def turn(self, client: str, key: object, make: Callable[[], Any]) -> Any:
        """As `Pages.turn` does beside others."""
        await asyncio.sleep(0)
        return make()

    def outbox(self, **options: Any) -> Outbox:
        pages: Any = self
        return Outbox(
            self.sequencer,
            pages,
            self.metrics,
            **{
                "client": "somebody",
                "filter": None,
                "page_max_events": self.page_max_events,
                "max_events": 1000,
                "heartbeat_seconds": HEARTBEAT_SECONDS,
                **options,
            },
        )

    async def live(self, cursor: int, **options: Any) -> tuple[Outbox, Steps]:
        """Return an outbox whose consumer stands at `cursor`, after which nothing is stored."""
        outbox = self.outbox(**options)
        steps = outbox.events(cursor)
        assert await until_caught_up(steps) == []
        return outbox, steps

    def publish(self, *seqs: int, end: int | None = None) -> Chunk:
        """Let the sequencer publish these seqs as one chunk that continues the head."""
        rows = [make_row(seq) for seq in seqs]
        self.table += rows
        head = self.sequencer.head
        end = end if end is not None else seqs[-1]
        chunk = encode_rows(rows, start=head, end=end, with_keys=True)
        self.sequencer.publish(chunk)
        return chunk

    def retire(self, floor: int) -> None:
        """Retention: the floor rises first, then the rows go."""
        self.floor = floor
        self.table = [row for row in self.table if row.seq >= floor]

    async def state(self) -> TableState:
        """As `Store.state` does."""
        kept = [row.seq for row in self.table if row.seq >= self.floor]
        return TableState(self.floor, None, kept[0] if kept else None)

    async def read(
        self, client: str, cursor: int, filter: Filter | None, _snapshot: None = None
    ) -> Page:
        """As `Pages.read` does, from the list."""
        self.reads.append(cursor)
        self.parked.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled_reads.append(cursor)
            raise
        if self.failures:
            raise self.failures.pop(0)
        head = self.sequencer.head
        rows = [row for row in self.table if cursor < row.seq <= head][: self.page_max_events]
        full = len(rows) == self.page_max_events
        end = rows[-1][0] if full else head
        chunk = encode_rows(rows, start=cursor, end=end, with_keys=True).select(filter)
        return Page(chunk, full, self.floor)

    @property
    def has_subscribers(self) -> bool:
        return bool(self.sequencer.subscribers)


def seqs_of(step: Step) -> list[int]:
    assert isinstance(step, Events), step
    return [seq for chunk in step.chunks for seq in chunk.seqs]


async def until_caught_up(steps: Steps) -> list[int]:
    """Read history to its end; return its seqs."""
    seqs = []
    async for step in steps:
        if isinstance(step, CaughtUp):
            return seqs
        seqs += seqs_of(step)
    raise AssertionError("the stream ended")


async def next_seqs(steps: Steps, count: int) -> list[int]:
    """Read on until `count` events have come."""
    seqs: list[int] = []
    while len(seqs) < count:
        seqs += seqs_of(await anext(steps))
    return seqs


class TestLive:
    @virtual_time
    async def test_a_consumer_at_the_head_gets_what_is_published_from_then_on(self) -> None:
        bench = Bench(history=10)
        outbox, steps = await bench.live(10)
        assert outbox.caught_up
        bench.publish(11, 12)
        bench.publish(14)
        assert await next_seqs(steps, 3) == [11, 12, 14]
        assert outbox.position == 14
        assert bench.reads == []

    @virtual_time
    async def test_a_waiting_consumer_wakes_at_once(self) -> None:
        bench = Bench()
        _, steps = await bench.live(0)
        asyncio.get_running_loop().call_later(7, bench.publish, 1)
        assert seqs_of(await anext(steps)) == [1]
        assert now() == pytest.approx(7)

    @virtual_time
    async def test_all_that_waits_comes_in_one_step_about_a_page_at_most(self) -> None:
        bench = Bench(page_max_events=4)
        _, steps = await bench.live(0)
        for seq in range(1, 41):
            bench.publish(seq)
        first = seqs_of(await anext(steps))
        assert 4 <= len(first) <= 8
        assert first + await next_seqs(steps, 40 - len(first)) == list(range(1, 41))

    @virtual_time
    async def test_connections_share_the_chunk_itself(self) -> None:
        bench = Bench()
        one, other = bench.outbox().events(0), bench.outbox().events(0)
        await until_caught_up(one)
        await until_caught_up(other)
        chunk = bench.publish(1, 2)
        for steps in (one, other):
            step = await anext(steps)
            assert isinstance(step, Events)
            assert step.chunks[0] is chunk
            await steps.aclose()

    @virtual_time
    async def test_holes_between_chunks_are_passed_over(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0)
        bench.publish(2, end=5)
        bench.publish(end=8)
        bench.publish(9)
        assert await next_seqs(steps, 2) == [2, 9]
        assert outbox.position == 9


class TestBackfill:
    @virtual_time
    async def test_history_comes_from_pages_then_from_the_ring_then_live(self) -> None:
        bench = Bench(history=10, page_max_events=4)
        bench.publish(11, 12, 13)
        bench.publish(14, 15)
        steps = bench.outbox().events(0)
        assert seqs_of(await anext(steps)) == [1, 2, 3, 4]
        assert seqs_of(await anext(steps)) == [5, 6, 7, 8]
        assert seqs_of(await anext(steps)) == [9, 10, 11, 12]
        # The ring covers 12: no page is read behind it.
        assert seqs_of(await anext(steps)) == [13, 14, 15]
        assert isinstance(await anext(steps), CaughtUp)
        await asyncio.sleep(0)
        assert bench.reads == [0, 4, 8]
        bench.publish(16)
        assert seqs_of(await anext(steps)) == [16]
        assert bench.metrics.count["ring_hits"] == 0

    @virtual_time
    async def test_a_cursor_inside_the_ring_needs_no_database(self) -> None:
        bench = Bench(history=10)
        bench.publish(11, 12, 13)
        bench.publish(14)
        steps = bench.outbox().events(12)
        assert await until_caught_up(steps) == [13, 14]
        assert bench.reads == []
        assert bench.metrics.count["ring_hits"] == 1

    @virtual_time
    async def test_a_long_way_through_the_ring_is_taken_in_pages(self) -> None:
        bench = Bench(page_max_events=4)
        for seq in range(1, 31):
            bench.publish(seq)
        outbox = bench.outbox()
        steps = outbox.events(0)
        sizes = []
        async for step in steps:
            if isinstance(step, CaughtUp):
                break
            sizes.append(len(seqs_of(step)))
            assert bench.has_subscribers == (outbox.position == 30)
        assert sum(sizes) == 30
        assert max(sizes) <= 4

    @virtual_time
    async def test_a_reader_whom_the_ring_left_behind_goes_on_from_the_database(self) -> None:
        bench = Bench(page_max_events=2, ring_max_bytes=4000)
        bench.publish(1)
        bench.publish(2)
        bench.publish(3)
        steps = bench.outbox().events(0)
        got = seqs_of(await anext(steps))
        for seq in range(4, 30):
            bench.publish(seq)
        assert not bench.sequencer.ring.covers(got[-1])
        assert got + await until_caught_up(steps) == list(range(1, 30))
        assert bench.reads[0] == got[-1]

    @virtual_time
    async def test_a_reader_whom_the_ring_leaves_behind_while_others_have_their_turn_goes_on(
        self,
    ) -> None:
        bench = Bench(page_max_events=2, ring_max_bytes=4000)
        bench.publish(1)
        bench.publish(2)
        bench.publish(3)
        reading = asyncio.ensure_future(anext(bench.outbox().events(0)))
        # It found its cursor in the ring, and has not taken the page yet.
        await asyncio.sleep(0)
        assert bench.sequencer.ring.covers(0)
        for seq in range(4, 30):
            bench.publish(seq)
        assert not bench.sequencer.ring.covers(0)
        assert seqs_of(await reading) == [1, 2]
        assert bench.reads[0] == 0

    @virtual_time
    async def test_the_next_page_is_read_while_this_one_is_being_written(self) -> None:
        bench = Bench(history=20, page_max_events=4)
        steps = bench.outbox().events(0)
        await anext(steps)
        await asyncio.sleep(0)
        assert bench.reads == [0, 4]

    @virtual_time
    async def test_pages_end_at_the_head_and_what_is_published_meanwhile_follows(self) -> None:
        bench = Bench(history=6, page_max_events=100, ring_max_bytes=0)
        steps = bench.outbox().events(0)
        assert seqs_of(await anext(steps)) == [1, 2, 3, 4, 5, 6]
        for seq in (7, 8, 9):
            bench.publish(seq)
        # The ring holds the last chunk alone: 7 and 8 are read from the database.
        assert await until_caught_up(steps) == [7, 8, 9]
        assert bench.reads == [0, 6]


class TestCutover:
    @virtual_time
    async def test_live_event_during_cutover_is_delivered_once(self) -> None:
        bench = Bench(history=3, page_max_events=100)
        bench.gate.clear()
        steps = bench.outbox().events(0)
        reading = asyncio.ensure_future(anext(steps))
        await bench.parked.wait()
        bench.publish(4)
        bench.publish(5)
        bench.gate.set()
        # The page was read up to the head of that moment, which was 5.
        assert seqs_of(await reading) == [1, 2, 3, 4, 5]
        bench.publish(6)
        assert await until_caught_up(steps) == [6]
        bench.publish(7)
        assert seqs_of(await anext(steps)) == [7]

    @pytest.mark.parametrize("steps_before", range(7))
    @virtual_time
    async def test_an_event_published_between_any_two_steps_is_delivered_once(
        self, steps_before: int
    ) -> None:
        bench = Bench(history=10, page_max_events=4)
        bench.publish(11)
        outbox = bench.outbox()
        steps = outbox.events(0)
        got: list[int] = []
        for _ in range(steps_before):
            step = await anext(steps)
            got += seqs_of(step) if isinstance(step, Events) else []
        bench.publish(12, 13)
        while outbox.position < 13:
            step = await anext(steps)
            got += seqs_of(step) if isinstance(step, Events) else []
        bench.publish(14)
        while outbox.position < 14:
            step = await anext(steps)
            got += seqs_of(step) if isinstance(step, Events) else []
        assert got == list(range(1, 15))

    @virtual_time
    async def test_events_between_the_subscription_and_the_first_read_wait_in_the_queue(
        self,
    ) -> None:
        bench = Bench()
        bench.publish(1)
        outbox = bench.outbox()
        steps = outbox.events(0)
        assert seqs_of(await anext(steps)) == [1]
        # Subscribed, and not yet told that it has caught up.
        bench.publish(2)
        assert outbox.position == 1
        assert isinstance(await anext(steps), CaughtUp)
        assert seqs_of(await anext(steps)) == [2]


class TestACursorAheadOfTheHead:
    @virtual_time
    async def test_it_is_waited_for_and_nothing_before_it_is_delivered(self) -> None:
        bench = Bench(history=10)
        _, steps = await bench.live(13)
        bench.publish(11, 12)
        bench.publish(13, 14)
        bench.publish(15)
        assert await next_seqs(steps, 2) == [14, 15]

    @virtual_time
    async def test_its_position_does_not_go_back(self) -> None:
        bench = Bench(history=10)
        outbox, steps = await bench.live(20, filter=ONLY_SPAM)
        # The first is hidden by the filter, the second is not.
        for seq in (12, 13):
            bench.publish(seq)
            assert outbox.position == 20
        assert seqs_of(await anext(steps)) == []
        assert outbox.position == 20
        bench.publish(22)
        assert outbox.position == 22


class TestOverflow:
    @virtual_time
    async def test_a_full_queue_ends_the_stream_and_frees_what_waited(self) -> None:
        bench = Bench(page_max_events=4)
        outbox = bench.outbox(max_events=10)
        closings: list[int] = []
        outbox.on_close = lambda: closings.append(bench.sequencer.head)
        steps = outbox.events(0)
        await until_caught_up(steps)
        bench.publish(1, 2, 3, 4)
        bench.publish(5, 6, 7, 8)
        # Eight wait: there is room for this chunk, and then no more.
        bench.publish(9, 10, 11, 12)
        assert outbox.closed is None
        assert outbox.queued == 12
        bench.publish(13)
        assert isinstance(outbox.closed, ConsumerTooSlow)
        assert outbox.queued == 0
        assert not bench.has_subscribers
        assert closings == [13]
        # Whatever comes now goes past it.
        bench.publish(14)
        assert outbox.queued == 0
        assert bench.metrics.count["queue_overflows"] == 1
        with pytest.raises(ConsumerTooSlow, match="more than 10 events"):
            await anext(steps)
        assert outbox.position == 0

    @virtual_time
    async def test_the_others_are_not_disturbed(self) -> None:
        bench = Bench()
        slow, quick = bench.outbox(max_events=2), bench.outbox()
        slow_steps, quick_steps = slow.events(0), quick.events(0)
        await until_caught_up(slow_steps)
        await until_caught_up(quick_steps)
        for seq in range(1, 6):
            bench.publish(seq)
        assert await next_seqs(quick_steps, 5) == [1, 2, 3, 4, 5]
        with pytest.raises(ConsumerTooSlow):
            await anext(slow_steps)
        await quick_steps.aclose()

    @virtual_time
    async def test_a_consumer_that_reads_as_it_comes_never_overflows(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0, max_events=2)
        for seq in range(1, 50):
            bench.publish(seq)
            assert seqs_of(await anext(steps)) == [seq]
        assert outbox.closed is None

    @virtual_time
    async def test_history_is_not_counted_against_the_queue(self) -> None:
        bench = Bench(history=50, page_max_events=4)
        outbox = bench.outbox(max_events=2)
        steps = outbox.events(0)
        assert await until_caught_up(steps) == list(range(1, 51))
        assert outbox.closed is None


class TestFilters:
    @virtual_time
    async def test_hidden_events_are_not_delivered_in_any_phase(self) -> None:
        bench = Bench(history=10, page_max_events=4)
        bench.publish(11, 12)
        bench.publish(13, 14, 15)
        outbox = bench.outbox(filter=ONLY_SPAM)
        steps = outbox.events(0)
        assert await until_caught_up(steps) == [1, 3, 5, 7, 9, 11, 13, 15]
        bench.publish(16, 17, 18)
        assert seqs_of(await anext(steps)) == [17]
        assert outbox.position == 18

    @virtual_time
    async def test_hidden_live_events_move_the_position_and_wake_nobody(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0, filter=ONLY_SPAM)
        reading = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        bench.publish(2)
        bench.publish(4, 6)
        assert outbox.position == 6
        await asyncio.sleep(1)
        assert not reading.done()
        bench.publish(7)
        assert seqs_of(await reading) == [7]

    @virtual_time
    async def test_hidden_events_do_not_pass_those_that_wait(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0, filter=ONLY_SPAM)
        bench.publish(1)
        bench.publish(2)
        # The position is what a reconnect starts from: 1 has not been yielded.
        assert outbox.position == 0
        assert seqs_of(await anext(steps)) == [1]
        assert outbox.position == 2

    @virtual_time
    async def test_what_the_filter_hides_is_not_counted_as_waiting(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0, filter=ONLY_SPAM, max_events=2)
        bench.publish(1)
        for seq in range(2, 24, 2):
            bench.publish(seq)
        assert (outbox.queued, outbox.closed) == (1, None)
        assert await next_seqs(steps, 1) == [1]
        assert outbox.position == 22

    @virtual_time
    async def test_consumers_with_the_same_filter_share_one_chunk(self) -> None:
        bench = Bench()
        one, other = bench.outbox(filter=ONLY_SPAM), bench.outbox(filter=ONLY_SPAM)
        chunks = []
        both = [outbox.events(0) for outbox in (one, other)]
        for steps in both:
            await until_caught_up(steps)
        bench.publish(1, 2, 3)
        for steps in both:
            step = await anext(steps)
            assert isinstance(step, Events)
            chunks += step.chunks
            await steps.aclose()
        assert chunks[0] is chunks[1]


class Express:
    """A socket's side: takes chunks at once, and can be full."""

    def __init__(self, outbox: Outbox) -> None:
        self.seqs: list[int] = []
        self.full = False
        outbox.express = self._take

    def _take(self, chunk: Chunk) -> bool:
        self.seqs += chunk.seqs
        return not self.full


class TestExpress:
    @virtual_time
    async def test_a_waiting_consumer_is_written_to_without_being_woken(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        for seq in (1, 2, 4):
            bench.publish(seq)
            assert express.seqs[-1] == outbox.position == seq
        await asyncio.sleep(1)
        assert not waiting.done()
        assert express.seqs == [1, 2, 4]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    @virtual_time
    async def test_nothing_goes_express_while_the_consumer_writes(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        # It is not waiting: the step before is still being written.
        bench.publish(1)
        bench.publish(2)
        assert express.seqs == []
        assert await next_seqs(steps, 2) == [1, 2]

    @virtual_time
    async def test_what_follows_a_full_socket_waits_in_the_queue(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        express.full = True
        bench.publish(1)
        bench.publish(2)
        assert express.seqs == [1]
        # Woken to wait for the socket, and given what came meanwhile.
        assert seqs_of(await waiting) == [2]
        express.full = False
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        bench.publish(3)
        assert express.seqs == [1, 3]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    @virtual_time
    async def test_a_full_socket_wakes_the_consumer_to_wait_for_it(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        express.full = True
        bench.publish(1)
        assert await waiting == Events([])
        assert express.seqs == [1]

    @virtual_time
    async def test_a_full_socket_that_stays_full_overflows_the_queue(self) -> None:
        bench = Bench()
        outbox = bench.outbox(max_events=5)
        Express(outbox).full = True
        steps = outbox.events(0)
        await until_caught_up(steps)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        for seq in range(1, 9):
            bench.publish(seq)
        assert isinstance(outbox.closed, ConsumerTooSlow)
        with pytest.raises(ConsumerTooSlow):
            await waiting

    @virtual_time
    async def test_it_puts_silence_off(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        asyncio.get_running_loop().call_later(10, bench.publish, 1)
        asyncio.get_running_loop().call_later(20, bench.publish, 2)
        assert isinstance(await anext(steps), Silence)
        assert now() == pytest.approx(20 + HEARTBEAT_SECONDS)
        assert express.seqs == [1, 2]

    @virtual_time
    async def test_falling_back_ends_it_until_the_consumer_has_caught_up(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        outbox.fall_back()
        bench.publish(1)
        # It is read from the table.
        assert seqs_of(await waiting) == [1]
        assert express.seqs == []
        assert await until_caught_up(steps) == []


class Told:
    """What an outbox hears of expiries: the test says when there are some."""

    def __init__(self) -> None:
        self.waiting: list[Notice] = []
        self.begun = self.left = 0

    def begin(self, on_news: Callable[[], None]) -> None:
        self.begun += 1
        self.on_news = on_news

    def leave(self) -> None:
        self.left += 1
        self.waiting = []

    def take(self, most: int) -> list[Notice]:
        told, self.waiting = self.waiting[:most], self.waiting[most:]
        return told

    def expire(self, *seqs: int) -> None:
        self.waiting += [Notice(float(seq), make_row(seq)) for seq in seqs]
        self.on_news()

    def __len__(self) -> int:
        return len(self.waiting)


def expired_in(step: Step) -> list[int]:
    assert isinstance(step, Expired), step
    return [notice.seq for notice in step.notices]


class TestExpiries:
    @virtual_time
    async def test_a_waiting_consumer_is_told_at_once_and_the_position_stays(self) -> None:
        bench, told = Bench(history=3), Told()
        outbox, steps = await bench.live(3, expiries=told)
        asyncio.get_running_loop().call_later(7, told.expire, 1, 2)
        assert seqs_of(await anext(steps)) == []
        assert expired_in(await anext(steps)) == [1, 2]
        assert now() == pytest.approx(7)
        assert outbox.position == 3

    @virtual_time
    async def test_labels_that_wait_come_first(self) -> None:
        bench, told = Bench(), Told()
        _, steps = await bench.live(0, expiries=told)
        bench.publish(1)
        told.expire(1)
        bench.publish(2)
        assert seqs_of(await anext(steps)) == [1, 2]
        assert expired_in(await anext(steps)) == [1]

    @virtual_time
    async def test_history_comes_first(self) -> None:
        bench, told = Bench(history=10, page_max_events=4), Told()
        steps = bench.outbox(expiries=told).events(0)
        assert told.begun == 1
        told.expire(2)
        assert await until_caught_up(steps) == list(range(1, 11))
        assert expired_in(await anext(steps)) == [2]

    @virtual_time
    async def test_they_come_about_a_page_at_a_time(self) -> None:
        bench, told = Bench(page_max_events=4), Told()
        _, steps = await bench.live(0, expiries=told)
        told.expire(*range(1, 11))
        assert [len(expired_in(await anext(steps))) for _ in range(3)] == [4, 4, 2]

    @virtual_time
    async def test_after_them_labels_go_express_again(self) -> None:
        bench, told = Bench(), Told()
        outbox = bench.outbox(expiries=told)
        express = Express(outbox)
        steps = outbox.events(0)
        await until_caught_up(steps)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        bench.publish(1)
        assert express.seqs == [1]
        told.expire(1)
        # From now on what comes is not written before the expiry that waits is read.
        bench.publish(2)
        assert express.seqs == [1]
        assert seqs_of(await waiting) == [2]
        assert expired_in(await anext(steps)) == [1]
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        bench.publish(3)
        assert express.seqs == [1, 3]
        waiting.cancel()

    @virtual_time
    async def test_events_and_expiries_that_wait_are_counted_together(self) -> None:
        bench, told = Bench(), Told()
        outbox, steps = await bench.live(0, max_events=5, expiries=told)
        bench.publish(1, 2)
        told.expire(1, 2, 3)
        assert (outbox.queued, outbox.closed) == (5, None)
        told.expire(4)
        assert isinstance(outbox.closed, ConsumerTooSlow)
        assert outbox.queued == 0
        assert told.left
        assert bench.metrics.count["queue_overflows"] == 1
        with pytest.raises(ConsumerTooSlow, match="more than 5 events"):
            await anext(steps)

    @virtual_time
    async def test_a_label_is_one_too_many_beside_expiries_that_wait(self) -> None:
        bench, told = Bench(), Told()
        outbox, _ = await bench.live(0, max_events=5, expiries=told)
        told.expire(1, 2, 3, 4, 5)
        bench.publish(1)
        assert isinstance(outbox.closed, ConsumerTooSlow)
        assert bench.metrics.count["queue_overflows"] == 1

    @virtual_time
    async def test_who_hangs_up_or_is_closed_asks_no_more(self) -> None:
        bench, gone, closed = Bench(), Told(), Told()
        _, steps = await bench.live(0, expiries=gone)
        await steps.aclose()
        outbox = bench.outbox(expiries=closed)
        outbox.events(0)
        outbox.close(ServerStopping("stop"))
        assert gone.left
        assert closed.left

    @virtual_time
    async def test_silence_is_silence_although_it_asks(self) -> None:
        bench, told = Bench(), Told()
        _, steps = await bench.live(0, expiries=told)
        assert isinstance(await anext(steps), Silence)
        assert now() == pytest.approx(HEARTBEAT_SECONDS)


class TestSilence:
    @virtual_time
    async def test_it_is_reported_each_time_nothing_came_for_the_heartbeat(self) -> None:
        bench = Bench()
        _, steps = await bench.live(0)
        for count in (1, 2, 3):
            assert isinstance(await anext(steps), Silence)
            assert now() == pytest.approx(count * HEARTBEAT_SECONDS)
        bench.publish(1)
        assert seqs_of(await anext(steps)) == [1]
        assert isinstance(await anext(steps), Silence)
        assert now() == pytest.approx(4 * HEARTBEAT_SECONDS)

    @virtual_time
    async def test_hidden_events_do_not_put_it_off(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0, filter=ONLY_SPAM)
        for seconds in range(1, 15):
            asyncio.get_running_loop().call_later(seconds, bench.publish, 2 * seconds)
        assert isinstance(await anext(steps), Silence)
        assert now() == pytest.approx(HEARTBEAT_SECONDS)
        assert outbox.position == 28

    @virtual_time
    async def test_an_event_that_comes_right_when_it_has_lasted_too_long_is_kept(self) -> None:
        bench = Bench()
        _, steps = await bench.live(0)
        reading = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        # The timer of the silence, which was set before, expires in the same turn of the loop.
        loop = asyncio.get_running_loop()
        loop.call_at(loop.time() + HEARTBEAT_SECONDS, bench.publish, 1)
        assert isinstance(await reading, Silence)
        assert now() == pytest.approx(HEARTBEAT_SECONDS)
        assert seqs_of(await anext(steps)) == [1]

    @virtual_time
    async def test_it_is_reported_while_a_page_is_being_read(self) -> None:
        bench = Bench(history=3, page_max_events=100)
        bench.gate.clear()
        steps = bench.outbox().events(0)
        for count in (1, 2):
            assert isinstance(await anext(steps), Silence)
            assert now() == pytest.approx(count * HEARTBEAT_SECONDS)
        bench.gate.set()
        assert seqs_of(await anext(steps)) == [1, 2, 3]
        # One read, however long it took.
        assert bench.reads == [0]


class TestRetention:
    @virtual_time
    async def test_events_that_were_taken_in_the_middle_of_a_backfill_are_told(self) -> None:
        bench = Bench(history=20, page_max_events=4)
        steps = bench.outbox().events(0)
        assert seqs_of(await anext(steps)) == [1, 2, 3, 4]
        # The next page is asked for, and not yet read.
        assert bench.reads == [0]
        bench.retire(floor=11)
        assert await anext(steps) == Outdated(cursor=4, floor=11)
        assert seqs_of(await anext(steps)) == [11, 12, 13, 14]
        assert await until_caught_up(steps) == [15, 16, 17, 18, 19, 20]

    @virtual_time
    async def test_a_cursor_below_the_floor_is_told_before_the_first_event(self) -> None:
        bench = Bench(history=10)
        bench.retire(floor=5)
        steps = bench.outbox().events(2)
        assert await anext(steps) == Outdated(cursor=2, floor=5)
        assert seqs_of(await anext(steps)) == [5, 6, 7, 8]

    @virtual_time
    async def test_a_single_event_that_was_taken_is_told_too(self) -> None:
        bench = Bench(history=10)
        bench.retire(floor=5)
        steps = bench.outbox().events(3)
        assert await anext(steps) == Outdated(cursor=3, floor=5)
        assert await until_caught_up(steps) == [5, 6, 7, 8, 9, 10]

    @virtual_time
    async def test_a_cursor_right_below_the_floor_has_lost_nothing(self) -> None:
        bench = Bench(history=10)
        bench.retire(floor=5)
        steps = bench.outbox().events(4)
        assert await until_caught_up(steps) == [5, 6, 7, 8, 9, 10]

    @virtual_time
    async def test_a_table_that_was_emptied_is_told_once_and_the_stream_goes_on(self) -> None:
        bench = Bench(history=10)
        bench.retire(floor=11)
        steps = bench.outbox().events(0)
        assert await anext(steps) == Outdated(cursor=0, floor=11)
        assert await until_caught_up(steps) == []
        bench.publish(11)
        assert seqs_of(await anext(steps)) == [11]

    @virtual_time
    async def test_a_reader_of_the_ring_that_falls_below_the_floor_is_told(self) -> None:
        bench = Bench(page_max_events=4)
        for seq in range(1, 31):
            bench.publish(seq)
        steps = bench.outbox().events(0)
        assert seqs_of(await anext(steps)) == [1, 2, 3, 4]
        bench.retire(floor=11)
        await bench.sequencer.read_state()
        assert await anext(steps) == Outdated(cursor=4, floor=11)
        assert await until_caught_up(steps) == list(range(11, 31))
        assert bench.reads == []

    @pytest.mark.parametrize("history", [0, 20])
    @virtual_time
    async def test_what_it_is_told_is_the_first_seq_that_follows(self, history: int) -> None:
        bench = Bench(history=history)
        bench.publish(21, 22, 27, 28, end=30)
        bench.retire(floor=25)
        await bench.sequencer.read_state()
        steps = bench.outbox().events(5)
        assert await anext(steps) == Outdated(cursor=5, floor=27)
        assert await until_caught_up(steps) == [27, 28]
        bench.publish(31)
        bench.retire(floor=30)
        bench.publish(33)
        await bench.sequencer.read_state()
        assert await next_seqs(steps, 2) == [31, 33]

    @virtual_time
    async def test_where_nothing_is_kept_it_is_the_first_that_can_follow(self) -> None:
        bench = Bench()
        bench.publish(1, 2, 3, end=8)
        bench.retire(floor=5)
        await bench.sequencer.read_state()
        steps = bench.outbox().events(0)
        assert await anext(steps) == Outdated(cursor=0, floor=9)
        assert await until_caught_up(steps) == []
        bench.publish(9)
        assert seqs_of(await anext(steps)) == [9]

    @virtual_time
    async def test_a_page_that_was_read_before_is_cut_off_below_the_floor(self) -> None:
        bench = Bench(history=20, page_max_events=8)
        bench.gate.clear()
        steps = bench.outbox(filter=ONLY_SPAM).events(0)
        reading = asyncio.ensure_future(anext(steps))
        await bench.parked.wait()
        # The rows are still there, as after a sweep that was killed.
        bench.floor = 6
        await bench.sequencer.read_state()
        bench.gate.set()
        assert await reading == Outdated(cursor=0, floor=6)
        assert await until_caught_up(steps) == [
            row.seq for row in bench.table if row.seq >= 6 and row.val == "spam"
        ]

    @virtual_time
    async def test_a_page_that_lies_below_the_floor_is_not_read_on_from(self) -> None:
        bench = Bench(history=100, page_max_events=4)
        steps = bench.outbox().events(0)
        assert seqs_of(await anext(steps)) == [1, 2, 3, 4]
        bench.floor = 91
        await bench.sequencer.read_state()
        assert await anext(steps) == Outdated(cursor=4, floor=91)
        assert await until_caught_up(steps) == list(range(91, 101))
        assert [cursor for cursor in bench.reads if cursor > 4] == [90, 94, 98]

    @virtual_time
    async def test_a_new_consumer_of_a_snapshot_starts_at_the_floor_and_is_not_told(self) -> None:
        bench = Bench(history=20, page_max_events=4)
        bench.floor = 11
        await bench.sequencer.read_state()
        outbox = bench.outbox(snapshot=Snapshot(20, resumed=False))
        steps = outbox.events(0)
        assert await next_seqs(steps, 10) == list(range(11, 21))
        assert await anext(steps) == SnapshotComplete(20)

    @virtual_time
    async def test_a_snapshot_that_the_floor_has_passed_is_complete_and_then_outdated(self) -> None:
        bench = Bench(history=20, page_max_events=4)
        steps = bench.outbox(snapshot=Snapshot(8, resumed=False)).events(0)
        assert seqs_of(await anext(steps)) == [1, 2, 3, 4]
        bench.floor = 11
        await bench.sequencer.read_state()
        assert await anext(steps) == SnapshotComplete(8)
        assert await anext(steps) == Outdated(cursor=8, floor=11)
        assert await until_caught_up(steps) == list(range(11, 21))


class TestALostDatabase:
    @virtual_time
    async def test_a_page_is_read_again_until_it_comes_and_silence_is_reported_meanwhile(
        self,
    ) -> None:
        bench = Bench(history=3, page_max_events=100)
        bench.failures = [DatabaseUnavailable("gone") for _ in range(12)]
        outbox = bench.outbox(heartbeat_seconds=3.0)
        steps = outbox.events(0)
        silences = 0
        while isinstance(step := await anext(steps), Silence):
            silences += 1
        assert silences >= 3
        assert seqs_of(step) == [1, 2, 3]
        assert bench.reads == [0] * 13
        # The waits grow: twelve failures take longer than a second each could explain at first.
        assert 15 < now() < 40

    @virtual_time
    async def test_live_is_not_concerned(self) -> None:
        bench = Bench()
        bench.failures = [DatabaseUnavailable("gone")]
        _, steps = await bench.live(0)
        bench.publish(1)
        assert seqs_of(await anext(steps)) == [1]

    @virtual_time
    async def test_any_other_error_ends_the_stream(self) -> None:
        bench = Bench(history=3)
        bench.failures = [SchemaError("label.id", "no sequence", "one")]
        steps = bench.outbox().events(0)
        with pytest.raises(SchemaError):
            await anext(steps)
        assert bench.reads == [0]


class TestClosing:
    @virtual_time
    async def test_closing_in_the_middle_of_a_backfill_ends_it_at_once(self) -> None:
        bench = Bench(history=3)
        bench.gate.clear()
        outbox = bench.outbox()
        steps = outbox.events(0)
        reading = asyncio.ensure_future(anext(steps))
        await bench.parked.wait()
        outbox.close(ServerStopping("stopping"))
        with pytest.raises(ServerStopping, match="stopping"):
            await reading
        assert now() == 0
        assert bench.cancelled_reads == [0]

    @virtual_time
    async def test_closing_between_two_pages_ends_it_with_the_next_step(self) -> None:
        bench = Bench(history=30)
        outbox = bench.outbox()
        steps = outbox.events(0)
        await anext(steps)
        outbox.close(ServerStopping("stopping"))
        with pytest.raises(ServerStopping):
            await anext(steps)
        assert outbox.position == 4

    @virtual_time
    async def test_closing_wakes_a_consumer_that_waits_for_the_next_event(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0)
        asyncio.get_running_loop().call_later(2, outbox.close, ServerStopping("stopping"))
        with pytest.raises(ServerStopping):
            await anext(steps)
        assert now() == pytest.approx(2)
        assert not bench.has_subscribers

    @virtual_time
    async def test_closing_before_the_first_step_is_remembered(self) -> None:
        bench = Bench(history=3)
        outbox = bench.outbox()
        outbox.close(ServerStopping("stopping"))
        with pytest.raises(ServerStopping):
            await anext(outbox.events(3))
        assert not bench.has_subscribers

    @virtual_time
    async def test_the_first_reason_stays(self) -> None:
        bench = Bench()
        outbox = bench.outbox()
        closings: list[None] = []
        outbox.on_close = lambda: closings.append(None)
        outbox.close(ServerStopping("first"))
        outbox.close(ConsumerTooSlow("second"))
        with pytest.raises(ServerStopping, match="first"):
            await anext(outbox.events(0))
        assert len(closings) == 1

    @virtual_time
    async def test_a_consumer_that_hangs_up_is_unsubscribed(self) -> None:
        bench = Bench()
        outbox, steps = await bench.live(0)
        assert bench.has_subscribers
        await steps.aclose()
        assert not bench.has_subscribers
        bench.publish(1)
        assert outbox.queued == 0

    @virtual_time
    async def test_a_consumer_that_hangs_up_cancels_the_page_read_ahead(self) -> None:
        bench = Bench(history=30)
        steps = bench.outbox().events(0)
        await anext(steps)
        bench.gate.clear()
        await asyncio.sleep(0)
        assert bench.reads == [0, 4]
        await steps.aclose()
        await asyncio.sleep(0)
        assert bench.cancelled_reads == [4]
        assert len(asyncio.all_tasks()) == 1

    @pytest.mark.parametrize("history", [0, 3])
    @virtual_time
    async def test_a_cancellation_passes_through_and_cleans_up(self, history: int) -> None:
        bench = Bench(history=history)
        bench.gate.clear()
        steps = bench.outbox().events(0)
        if history == 0:
            await until_caught_up(steps)
        reading = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.sleep(0)
        assert not bench.has_subscribers
        assert len(asyncio.all_tasks()) == 1


class TestBrokenPromises:
    @pytest.mark.parametrize("seqs", [[7], []])
    @virtual_time
    async def test_a_live_chunk_that_leaves_a_hole_stops_the_stream(self, seqs: list[int]) -> None:
        bench = Bench()
        bench.publish(1)
        outbox, steps = await bench.live(1)
        outbox.push(encode_rows([make_row(seq) for seq in seqs], start=5, end=7))
        with pytest.raises(BrokenPromise, match="does not continue position 1"):
            await anext(steps)
        assert outbox.position == 1
        assert not bench.has_subscribers

    @virtual_time
    async def test_a_page_that_leaves_a_hole_stops_the_stream(self) -> None:
        bench = Bench(history=10)
        outbox = bench.outbox()

        async def read(*_asked: object) -> Page:
            return Page(encode_rows([make_row(5)], start=4, end=5), False, 1)

        bench.read = read  # type: ignore[method-assign]
        with pytest.raises(BrokenPromise, match="does not continue position 0"):
            await anext(outbox.events(0))
        assert outbox.position == 0


class TestChunkQueue:
    @staticmethod
    def chunk(start: int, events: int) -> Chunk:
        rows = [make_row(seq) for seq in range(start + 1, start + 1 + events)]
        return encode_rows(rows, start=start, end=start + max(1, events))

    async def test_its_size_and_bound_are_events(self) -> None:
        queue = ChunkQueue(5)
        queue.put_nowait(self.chunk(0, 3))
        queue.put_nowait(self.chunk(3, 0))
        assert queue.qsize() == 3
        assert not queue.full()
        queue.put_nowait(self.chunk(4, 100))
        assert queue.qsize() == 103
        assert queue.full()
        with pytest.raises(asyncio.QueueFull):
            queue.put_nowait(self.chunk(104, 1))
        assert queue.qsize() == 103

    async def test_chunks_without_events_become_one_and_lose_no_position(self) -> None:
        queue = ChunkQueue(5)
        queue.put_nowait(self.chunk(0, 1))
        for start in range(1, 1000):
            queue.put_nowait(self.chunk(start, 0))
        queue.put_nowait(self.chunk(1000, 1))
        taken = []
        while not queue.empty():
            taken.append(queue.get_nowait())
        assert [(chunk.start, chunk.end, list(chunk.seqs)) for chunk in taken] == [
            (0, 1, [1]), (1, 1000, []), (1000, 1001, [1001]),
        ]  # fmt: skip

    async def test_getting_gives_the_room_back_in_order(self) -> None:
        queue = ChunkQueue(5)
        chunks = [self.chunk(0, 2), self.chunk(2, 0), self.chunk(3, 1)]
        for chunk in chunks:
            queue.put_nowait(chunk)
        assert [queue.get_nowait() for _ in chunks] == chunks
        assert queue.qsize() == 0
        assert queue.empty()


# Every interleaving, against a list.


@dataclass
class Consumer:
    """What a client has received so far, and what it may hold against us."""

    cursor: int
    filter: Filter | None
    received: list[int] = field(default_factory=list)
    #: Told to be gone: (cursor, floor).
    outdated: list[tuple[int, int]] = field(default_factory=list)
    caught_up: int = 0

    def take(self, step: Step, published: list[Row], position: int) -> None:
        match step:
            case Events(chunks):
                for chunk in chunks:
                    self.received += chunk.seqs
                    self.check(published, chunk.end)
            case Outdated(cursor, floor):
                self.outdated.append((cursor, floor))
            case CaughtUp():
                self.caught_up += 1
        # A reconnect starts from here: nothing at or below may be missing.
        self.check(published, position)

    def check(self, published: list[Row], position: int) -> None:
        """Strictly increasing after the cursor, nothing missing up to `position`."""
        known = [
            row.seq
            for row in published
            if row.seq > self.cursor and (self.filter is None or row.val == "spam")
        ]
        through = max(position, self.received[-1]) if self.received else position
        possible = [seq for seq in known if seq <= through]
        owed = [
            seq
            for seq in possible
            if not any(cursor < seq < floor for cursor, floor in self.outdated)
        ]
        assert self.received == [seq for seq in possible if seq in set(self.received)]
        assert set(owed) <= set(self.received)


class World(Bench):
    """A bench on which everything happens in an order that a random generator chooses."""

    def __init__(self, random: random.Random) -> None:
        super().__init__(
            history=random.choice([0, 3, 20]),
            page_max_events=random.choice([1, 3, 10]),
            ring_max_bytes=random.choice([0, 1000, 4000, PLENTY]),
        )
        self.random = random
        self.published = list(self.table)
        self.gates: list[asyncio.Event] = []
        self.open = False
        for _ in range(random.randrange(4)):
            self.grow()

    def grow(self) -> None:
        """Publish a few events with holes before, between and behind them."""
        seqs = []
        seq = self.sequencer.head
        for _ in range(self.random.randrange(4)):
            seq += self.random.choice([1, 1, 1, 2, 4])
            seqs.append(seq)
        end = seq + self.random.choice([0, 0, 0, 1])
        if end > self.sequencer.head:
            self.published += [make_row(seq) for seq in seqs]
            self.publish(*seqs, end=end)

    async def read(
        self, client: str, cursor: int, filter: Filter | None, _snapshot: None = None
    ) -> Page:
        if not self.open:
            gate = asyncio.Event()
            self.gates.append(gate)
            await gate.wait()
            if self.random.random() < 0.1:
                raise DatabaseUnavailable("gone")
        return await super().read(client, cursor, filter)

    async def run(self) -> None:
        random, head = self.random, self.sequencer.head
        filter = random.choice([None, None, ONLY_SPAM])
        outbox = self.outbox(
            filter=filter, max_events=random.choice([1, 5, 30, 1000]), heartbeat_seconds=0.01
        )
        consumer = Consumer(random.choice([0, random.randint(0, head + 3), head]), filter)
        steps = outbox.events(consumer.cursor)
        reading: asyncio.Future[Step] | None = None
        retires = random.random() < 0.3

        for _ in range(50):
            match random.choice(["grow", "grow", "page", "read", "read", "read", "wait", "retire"]):
                case "grow":
                    self.grow()
                case "page" if self.gates:
                    self.gates.pop(0).set()
                case "retire" if retires and random.random() < 0.3:
                    self.retire(random.randint(self.floor, self.sequencer.head + 1))
                case "wait":
                    await asyncio.sleep(random.choice([0, 0, 1]))
                case "read" if reading is None:
                    reading = asyncio.ensure_future(anext(steps))
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            if reading is not None and reading.done():
                if reading.exception() is not None:
                    break
                consumer.take(reading.result(), self.published, outbox.position)
                reading = None
        if random.random() < 0.2 and (reading is None or not reading.done()):
            await self.hang_up(steps, reading)
        else:
            await self.finish(outbox, consumer, steps, reading)
        await asyncio.sleep(0)
        assert not self.has_subscribers
        assert outbox.queued == 0 or outbox.closed is None
        assert len(asyncio.all_tasks()) == 1

    async def hang_up(self, steps: Steps, reading: asyncio.Future[Step] | None) -> None:
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])
        await steps.aclose()

    async def finish(
        self,
        outbox: Outbox,
        consumer: Consumer,
        steps: Steps,
        reading: asyncio.Future[Step] | None,
    ) -> None:
        """Let the consumer read to the end; either all has come, or it was too slow."""
        self.open = True
        for gate in self.gates:
            gate.set()
        try:
            while outbox.position < self.sequencer.head or not outbox.caught_up:
                step = await (reading or anext(steps))
                reading = None
                consumer.take(step, self.published, outbox.position)
            if reading is not None:
                consumer.take(await reading, self.published, outbox.position)
        except ConsumerTooSlow:
            assert self.metrics.count["queue_overflows"] == 1
            # All that it was told of is a run without holes from its cursor.
            consumer.check(self.published, consumer.cursor)
        else:
            assert outbox.closed is None
            consumer.check(self.published, self.sequencer.head)
            assert consumer.caught_up <= 1
            await steps.aclose()


class TestEveryInterleaving:
    @settings(max_examples=40)
    @given(st.randoms(use_true_random=False))
    @virtual_time
    async def test_what_is_delivered_is_a_run_without_holes_after_the_cursor(
        self, random: random.Random
    ) -> None:
        await World(random).run()

    @virtual_time
    async def test_so_it_is_in_many_longer_runs(self) -> None:
        for seed in range(300):
            await World(random.Random(seed)).run()
