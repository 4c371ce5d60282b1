"""The expiry and its readers against a table that is a list, in any order of events.

Time is virtual, and the clock counts it; the database may be away at any moment.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.errors import DatabaseUnavailable
from sse_labels.expiry import expiry as module
from sse_labels.expiry.expiry import HORIZON_SECONDS, LOOK_SECONDS, Expiry
from sse_labels.expiry.reader import ExpiryReader
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row

from support.virtual_time import VirtualTimeLoop, virtual_time

#: Longer than any time in a test, with all the waits of a database that was away.
LONG_SECONDS = 3 * HORIZON_SECONDS
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ONLY_SPAM = Filter(values=frozenset({"spam"}))


def exp_of(seconds: float) -> str:
    return (EPOCH + timedelta(seconds=seconds)).isoformat()


class Bench:
    """A table, a clock, and an expiry on them that runs inside the block."""

    def __init__(self, **options: Any) -> None:
        self.table: list[Row] = []
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()
        #: How often the table was asked for what expires.
        self.loads = 0
        self.shift = 0.0
        self.metrics = Metrics()
        store: Any = self
        self.expiry = Expiry(store, lambda: self.head, self.metrics, clock=self.clock, **options)

    async def __aenter__(self) -> Bench:
        self._running = asyncio.create_task(self.expiry.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running

    @property
    def head(self) -> int:
        return len(self.table)

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.shift

    def publish(self, key: str, exp: float | None, *, neg: bool = False, val: str = "spam") -> int:
        """Store a label and let the sequencer publish it; return its seq."""
        text = None if exp is None else exp_of(exp)
        row = Row(self.head + 1, "did:plc:a", f"at://b/{key}", "", val, neg, "t", text, None)
        self.expiry.take([row])
        self.table.append(row)
        return self.head

    def in_force(self, row: Row, head: int) -> bool:
        newer = [other for other in self.table[row.seq : head] if other.key == row.key]
        return row.seq <= head and not row.neg and not newer

    async def expiring(
        self, date: str, seq: int, last_date: str, limit: int
    ) -> list[tuple[str, int, str]]:
        """As the store does, from the list."""
        await self._answer()
        self.loads += 1
        found = [(row.exp[:10], row.seq, row.exp) for row in self.table if row.exp and not row.neg]
        return sorted(one for one in found if (date, seq) < one[:2] and one[0] <= last_date)[:limit]

    async def still_in_force(self, seqs: list[int], until: int) -> list[Row]:
        """As the store does, from the list."""
        rows = [row for row in self.table if row.seq in seqs and self.in_force(row, until)]
        await self._answer()
        return rows[::-1]

    async def _answer(self) -> None:
        await asyncio.sleep(0.001)
        await self.gate.wait()
        if self.away:
            raise DatabaseUnavailable("away")


class Consumer:
    """A live stream that takes whatever there is."""

    def __init__(self, bench: Bench, since: float = inf, filter: Filter | None = None) -> None:
        self.bench = bench
        self.since = min(since, bench.clock())
        self.told: list[tuple[float, int]] = []
        self.reader = ExpiryReader(bench.expiry, "somebody", filter, since)
        self.reader.begin(self.hear)
        self.hear()

    def hear(self) -> None:
        for notice in self.reader.take(2):
            # Never when a newer one has come first.
            row = self.bench.table[notice.seq - 1]
            assert self.bench.in_force(row, self.bench.head)
            assert self.since < notice.at <= self.bench.clock()
            self.told.append((notice.at, notice.seq))
            asyncio.get_running_loop().call_soon(self.hear)

    @property
    def seqs(self) -> list[int]:
        return [seq for _, seq in self.told]


class TestLive:
    @virtual_time
    async def test_a_label_is_told_when_it_expires_and_not_before(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 50)
            consumer = Consumer(bench)
            await asyncio.sleep(49.9)
            assert consumer.told == []
            await asyncio.sleep(0.2)
            assert consumer.told == [(50, 1)]

    @virtual_time
    async def test_what_had_expired_when_it_began_to_ask_is_not_told(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            await asyncio.sleep(10)
            consumer = Consumer(bench)
            bench.publish("b", 6)
            bench.publish("c", 20)
            await asyncio.sleep(LONG_SECONDS)
            assert consumer.seqs == [3]

    @virtual_time
    async def test_what_expired_before_it_was_settled_is_told_at_once(self) -> None:
        async with Bench() as bench:
            consumer = Consumer(bench)
            await asyncio.sleep(10)
            bench.publish("a", 9)
            await asyncio.sleep(1)
            assert consumer.seqs == [1]

    @virtual_time
    async def test_each_sees_what_its_filter_lets_through(self) -> None:
        async with Bench() as bench:
            everything, spam = Consumer(bench), Consumer(bench, filter=ONLY_SPAM)
            bench.publish("a", 5, val="rude")
            bench.publish("b", 6)
            await asyncio.sleep(10)
            assert everything.seqs == [1, 2]
            assert spam.seqs == [2]


class TestIdle:
    @virtual_time
    async def test_while_nobody_asks_the_table_is_not_read_and_nothing_is_kept(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 50)
            await asyncio.sleep(LONG_SECONDS)
            assert bench.loads == 0
            assert bench.metrics.gauges["expiries_scheduled"]() == 0

    @virtual_time
    async def test_when_the_last_has_left_it_rests_again(self) -> None:
        async with Bench() as bench:
            one, other = Consumer(bench), Consumer(bench)
            bench.publish("a", 50)
            await asyncio.sleep(1)
            one.reader.leave()
            one.reader.leave()
            await asyncio.sleep(60)
            assert other.seqs == [1]
            assert one.seqs == []
            other.reader.leave()
            await asyncio.sleep(1)
            loads = bench.loads
            bench.publish("b", 100)
            await asyncio.sleep(LONG_SECONDS)
            assert bench.loads == loads
            assert bench.metrics.gauges["expiries_scheduled"]() == 0

    @virtual_time
    async def test_whoever_asks_while_the_first_load_fails_is_told_of_all(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 50)
            bench.away = True
            one = Consumer(bench)
            await asyncio.sleep(1)
            one.reader.leave()
            other = Consumer(bench)
            await asyncio.sleep(100)
            bench.away = False
            await asyncio.sleep(LOOK_SECONDS + 10)
            assert other.seqs == [1]

    @virtual_time
    async def test_the_table_is_read_once_for_each_horizon(self) -> None:
        async with Bench() as bench:
            Consumer(bench)
            for number in range(20):
                bench.publish(str(number), 500 * number + 1)
            await asyncio.sleep(3.9 * HORIZON_SECONDS)
            assert bench.loads == 5


class TestClock:
    @virtual_time
    async def test_set_forward_it_tells_all_that_is_over_then(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 50)
            bench.publish("b", 2 * HORIZON_SECONDS)
            consumer = Consumer(bench)
            await asyncio.sleep(1)
            bench.shift = 3 * HORIZON_SECONDS
            await asyncio.sleep(2 * LOOK_SECONDS)
            assert consumer.seqs == [1, 2]

    @virtual_time
    async def test_set_back_it_begins_there_once_more(self) -> None:
        async with Bench() as bench:
            bench.shift = 10_000
            consumer = Consumer(bench)
            bench.publish("a", 10_001)
            await asyncio.sleep(10)
            consumer.since = 0
            bench.shift = 0
            await asyncio.sleep(LOOK_SECONDS)
            bench.publish("b", 100)
            await asyncio.sleep(200)
            assert consumer.seqs == [1, 2]
            await asyncio.sleep(10_000)
            assert consumer.seqs == [1, 2, 1]


class TestSuperseded:
    @virtual_time
    async def test_what_waits_for_a_slow_stream_is_let_go_when_a_newer_label_comes(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            bench.publish("b", 5)
            slow = ExpiryReader(bench.expiry, "somebody", None, inf)
            slow.begin(lambda: None)
            assert slow.take(10) == []
            await asyncio.sleep(10)
            assert len(slow) == 2
            bench.publish("a", None, neg=True)
            assert [notice.seq for notice in slow.take(10)] == [2]

    @virtual_time
    async def test_a_label_that_is_published_during_the_check_comes_first(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            bench.publish("b", 5)
            consumer = Consumer(bench)
            await asyncio.sleep(1)
            bench.gate.clear()
            await asyncio.sleep(5)
            bench.publish("a", None)
            bench.gate.set()
            await asyncio.sleep(10)
            assert consumer.seqs == [2]
            assert not bench.expiry._newer


class TestReaders:
    @virtual_time
    async def test_readers_of_the_same_page_share_one_read(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            first = Consumer(bench)
            await asyncio.sleep(10)
            loads = bench.loads
            others = [Consumer(bench, since=1) for _ in range(5)]
            await asyncio.sleep(1)
            assert bench.loads == loads + 1
            assert all(other.seqs == [1] for other in others)
            assert first.seqs == [1]

    @virtual_time
    async def test_a_reader_that_leaves_in_the_midst_disturbs_nobody(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            first = Consumer(bench)
            await asyncio.sleep(10)
            bench.gate.clear()
            one, other = Consumer(bench, since=1), Consumer(bench, since=1)
            await asyncio.sleep(1)
            one.reader.leave()
            bench.gate.set()
            await asyncio.sleep(1)
            assert (one.seqs, other.seqs, first.seqs) == ([], [1], [1])
            await bench.expiry.close()

    @virtual_time
    async def test_nothing_is_read_for_those_who_left_while_they_waited_their_turn(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            first = Consumer(bench)
            await asyncio.sleep(10)
            bench.gate.clear()
            loads = bench.loads
            one, gone, last = (Consumer(bench, since=since) for since in (1, 2, 3))
            await asyncio.sleep(1)
            gone.reader.leave()
            await asyncio.sleep(1)
            bench.gate.set()
            await asyncio.sleep(1)
            assert (one.seqs, gone.seqs, last.seqs, first.seqs) == ([1], [], [1], [1])
            # The last one's lies in what was looked for first.
            assert bench.loads == loads + 1

    @virtual_time
    async def test_what_a_read_does_not_expect_ends_the_stream_that_waits_for_it(self) -> None:
        async with Bench() as bench:
            bench.publish("a", 5)
            Consumer(bench)
            await asyncio.sleep(10)
            reader = ExpiryReader(bench.expiry, "somebody", None, 1)
            heard = asyncio.Event()
            reader.begin(heard.set)

            async def broken(*_: object) -> list[Row]:
                raise ZeroDivisionError

            bench.still_in_force = broken  # type: ignore[method-assign,assignment]
            assert reader.take(10) == []
            await heard.wait()
            with pytest.raises(ZeroDivisionError):
                reader.take(10)


KEYS = st.sampled_from("abcdef")
PUBLISH = st.tuples(
    st.just("publish"),
    KEYS,
    st.none() | st.floats(0.5, 9000),
    st.sampled_from([False] * 4 + [True]),
)
STEPS = st.lists(
    PUBLISH
    | PUBLISH
    | st.tuples(st.just("sleep"), st.floats(0, 3000))
    | st.tuples(st.just("sleep"), st.just(0.0015))
    | st.tuples(st.just("away"), st.booleans())
    | st.tuples(st.just("ask"), st.just(inf) | st.floats(0, 9000))
    | st.tuples(st.just("leave"), st.integers(0, 5)),
    max_size=40,
)


@given(steps=STEPS, most=st.sampled_from([4, 8, 1000]))
def test_in_any_order_of_events_each_is_told_once_in_order_of_time(
    steps: list[Any], most: int
) -> None:
    async def play() -> None:
        async with Bench(max_labels=most) as bench:
            consumers: list[Consumer] = []
            for step in steps:
                match step:
                    case ("publish", key, after, neg):
                        bench.publish(
                            key, None if after is None else bench.clock() + after, neg=neg
                        )
                    case ("sleep", seconds):
                        await asyncio.sleep(seconds)
                    case ("away", away):
                        bench.away = away
                    case ("ask", ago):
                        consumers.append(
                            Consumer(bench, max(0.0, bench.clock() - ago) if ago < inf else inf)
                        )
                    case ("leave", number) if consumers:
                        consumers.pop(number % len(consumers)).reader.leave()
            bench.away = False
            await asyncio.sleep(LONG_SECONDS + 9000)
            over = sorted(
                (at, row.seq)
                for row in bench.table
                if bench.in_force(row, bench.head)
                and row.exp
                and (at := datetime.fromisoformat(row.exp).timestamp()) <= bench.clock()
            )
            for consumer in consumers:
                assert consumer.told == sorted(set(consumer.told))
                wanted = {due for due in over if due[0] > consumer.since}
                assert wanted <= set(consumer.told)

    few = {"PAGE_LABELS": 2, "RUN_LABELS": 3, "LOAD_ROWS": 3, "CHECKED_AT_ONCE": 2}
    with (
        pytest.MonkeyPatch.context() as patch,
        asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
    ):
        for name, value in few.items():
            patch.setattr(module, name, value)
        runner.run(play())
