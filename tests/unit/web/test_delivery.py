"""From the table to the client in any order of events: a strictly increasing run without holes.

A stateful model. Store, pages, ring, sequencer and outbox are the real ones; only the database is
a list, whose answers come when the machine says so. Labels are committed out of order beyond the
head, published, retired and deleted while consumers read history, cut over, live, lag, hang up,
are stopped and come back. What they received is compared with all that was ever published.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sse_labels.database.schema import Schema
from sse_labels.errors import ConsumerTooSlow, DatabaseUnavailable, ServerStopping, StreamClosed
from sse_labels.feed.chunk import encode_rows
from sse_labels.feed.outbox import Outbox
from sse_labels.feed.pages import Pages
from sse_labels.feed.ring import Ring
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.steps import CaughtUp, Events, Outdated, Silence, Step
from sse_labels.feed.store import Store
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row, label_json

from support.eventsource import EventSourceParser

PLENTY = 2**30
HEARTBEAT_SECONDS = 15.0
SOURCES = ("did:plc:a", "did:plc:b")
MAX_CONSUMERS = 3


def make_row(seq: int) -> Row:
    """Any three rows in succession differ in what a filter looks at."""
    val = "spam" if seq % 3 else "porn"
    return Row(seq, SOURCES[seq % 2], f"at://b/{seq}", "", val, None, "t", None, None)


#: What consumers may ask for, and the same said plainly.
FILTERS: tuple[tuple[Filter | None, Callable[[int], bool]], ...] = (
    (None, lambda seq: True),
    (Filter(values=frozenset({"porn"})), lambda seq: seq % 3 == 0),
    (Filter(sources=frozenset({SOURCES[1]})), lambda seq: seq % 2 == 1),
    (Filter(uri_prefixes=("at://b/1",)), lambda seq: str(seq).startswith("1")),
    (Filter(values=frozenset({"nobody"})), lambda seq: False),
)


#: Who connects: how far behind the head (or before it), which filter, how much may wait.
CONSUMERS = st.tuples(
    st.sampled_from([0, 0, 1, 3, 1000, 1000, -1, -3, -6]) | st.integers(0, 20),
    st.sampled_from([0, 0, 0, *range(1, len(FILTERS))]),
    st.sampled_from([1, 2, 5, 1000, 1000]),
)


#: What is published at once: the distances between the labels, and the holes behind them.
CHUNKS = st.tuples(
    st.lists(st.sampled_from([1, 1, 1, 2, 4]), max_size=4), st.sampled_from([0, 0, 1])
)


class ManualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock is set by the machine, so that no timer expires by itself."""

    now = 0.0

    def time(self) -> float:
        return self.now


class Database:
    """The label table and the floor; each query waits for the machine."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.floor = 1
        self.waiting: list[asyncio.Future[None]] = []
        self.open = False

    async def fetch(self, name: str, *, cursor: int = 0, limit: int = 0) -> list[Any]:
        if not self.open:
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(answer)
            await answer
        if name == "state":
            first = min((seq for seq in self.rows if seq >= self.floor), default=None)
            return [(self.floor, "epoch", None, first)]
        assert name == "rows_after"
        return [self.rows[seq] for seq in sorted(self.rows) if seq > cursor][:limit]


@dataclass(eq=False)
class Consumer:
    """One connection, and what its client made of it."""

    outbox: Outbox
    cursor: int
    wants: Callable[[int], bool]
    max_events: int
    #: A cursor ahead of the head lets chunks wait that it will never see.
    ahead: bool
    steps: Any = None
    reading: asyncio.Future[Step] | None = None
    parser: EventSourceParser = field(default_factory=EventSourceParser)
    received: list[int] = field(default_factory=list)
    #: Told to be gone: (cursor, floor).
    outdated: list[tuple[int, int]] = field(default_factory=list)
    position: int = 0
    caught_up: bool = False
    #: Readings that began when the stream had ended already.
    late_readings: int = 0
    #: The floor that was known when the reading began.
    known_floor: int = 1
    #: A page that was read before it was told to be below the floor comes next.
    holds_page: bool = False
    gone: bool = False


class Delivery(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = ManualTime()
        self.consumers: list[Consumer] = []

    @initialize(
        history=st.lists(st.integers(1, 3), max_size=12),
        page_max_events=st.sampled_from([1, 2, 3, 10]),
        ring_max_bytes=st.sampled_from([0, 1000, 3000, PLENTY]),
        cache_max_bytes=st.sampled_from([0, 2000, PLENTY]),
        max_reads=st.sampled_from([1, 4]),
        consumers=st.lists(CONSUMERS, min_size=1, max_size=2),
    )
    def begin(
        self,
        history: list[int],
        page_max_events: int,
        ring_max_bytes: int,
        cache_max_bytes: int,
        max_reads: int,
        consumers: list[tuple[int, int, int]],
    ) -> None:
        self.page_max_events = page_max_events
        self.database = Database()
        self.metrics = Metrics()
        database: Any = self.database
        schema = Schema(database)
        schema.has_state = True
        store = Store(database, schema)
        self.sequencer = Sequencer(
            store,
            self.metrics,
            page_max_events=page_max_events,
            ring_max_bytes=ring_max_bytes,
            poll_seconds=1,
            gather_seconds=0,
        )
        seq = 0
        for gap in history:
            seq += gap
            self.database.rows[seq] = make_row(seq)
        self.sequencer.ring = Ring(seq, ring_max_bytes)
        #: Every floor there was.
        self.floors = [1]
        #: Every seq that was ever settled.
        self.published = sorted(self.database.rows)
        #: The chunks that were published: start, end.
        self.chunks: list[tuple[int, int]] = []
        self.pages = Pages(
            store,
            lambda: self.sequencer.head,
            self.metrics,
            page_max_events=page_max_events,
            max_reads=max_reads,
            cache_max_bytes=cache_max_bytes,
        )
        for consumer in consumers:
            self.connect(consumer)

    # What happens at the table.

    @rule(ahead=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
    def commit(self, ahead: list[int]) -> None:
        """Labels appear beyond the head, smaller ones after larger ones too."""
        for distance in ahead:
            seq = self.sequencer.head + distance
            self.database.rows.setdefault(seq, make_row(seq))

    @rule(chunks=st.lists(CHUNKS, min_size=1, max_size=4))
    def publish(self, chunks: list[tuple[list[int], int]]) -> None:
        """One chunk after the other, and nobody reads between."""
        for gaps, holes_at_end in chunks:
            self.publish_chunk(gaps, holes_at_end)

    @rule(
        chunks=st.lists(CHUNKS, min_size=1, max_size=4),
        turns=st.lists(st.integers(0, 2), min_size=4, max_size=4),
        seconds=st.sampled_from([0, 0, 1, HEARTBEAT_SECONDS]),
    )
    def publish_while_all_read(
        self, chunks: list[tuple[list[int], int]], turns: list[int], seconds: float
    ) -> None:
        """Between any two steps of whoever reads, and right when a silence has lasted too long."""

        async def publish() -> None:
            for (gaps, holes_at_end), turns_before in zip(chunks, turns, strict=False):
                await _turns(turns_before)
                self.publish_chunk(gaps, holes_at_end)

        for consumer in self.present():
            self.start_reading(consumer)
        self.loop.now += seconds
        self.run(publish())
        self.turn(2)

    def publish_chunk(self, gaps: list[int], holes_at_end: int) -> None:
        """Some more labels, and all up to a seq is settled."""
        start = end = self.sequencer.head
        for gap in gaps:
            end += gap
            self.database.rows.setdefault(end, make_row(end))
        end += holes_at_end
        if start == end:
            return
        seqs = [seq for seq in sorted(self.database.rows) if start < seq <= end]
        rows = [self.database.rows[seq] for seq in seqs]
        waiting = {consumer: self.weight_of_waiting(consumer) for consumer in self.live()}
        self.published += seqs
        self.chunks.append((start, end))
        positions = [(consumer, consumer.outbox.position) for consumer in self.present()]
        self.sequencer.publish(encode_rows(rows, start=start, end=end, with_keys=True))
        for consumer, position in positions:
            assert consumer.outbox.position >= position
            assert consumer.outbox.closed is None or consumer.outbox.queued == 0
        for consumer, weight in waiting.items():
            outbox = consumer.outbox
            if outbox.caught_up and not consumer.ahead and consumer.steps is not None:
                # Cut off exactly when a chunk found the queue full, neither earlier nor later.
                full = weight >= consumer.max_events
                assert isinstance(outbox.closed, ConsumerTooSlow) == full

    def weight_of_waiting(self, consumer: Consumer) -> int:
        """The events that were published for a consumer and not yet handed to it."""
        return sum(
            start < seq <= end and consumer.wants(seq)
            for start, end in self.chunks
            if end > consumer.outbox.position
            for seq in self.published
        )

    @rule(part=st.sampled_from([0, 0.2, 0.5, 0.9, 1]), deletes=st.booleans())
    def retire(self, part: float, deletes: bool) -> None:
        """Retention says first what it takes, and takes it then or later."""
        head = self.sequencer.head
        self.database.floor = max(self.database.floor, round(part * (head + 1)))
        self.floors.append(self.database.floor)
        if deletes:
            for seq in [seq for seq in self.database.rows if seq < self.database.floor]:
                del self.database.rows[seq]

    @rule()
    def hear_of_the_floor(self) -> None:
        """A notification, or the next sweep."""
        looking = self.loop.create_task(self.sequencer.read_state())
        self.turn(1)
        while not looking.done():
            self.answer(len(self.database.waiting) - 1, fails=False)
        assert self.sequencer.floor == self.database.floor
        assert self.sequencer.ring.start >= min(self.database.floor - 1, self.sequencer.head)

    @precondition(lambda self: self.database.waiting)
    @rule(number=st.integers(0, 5), fails=st.sampled_from([False, False, False, True]))
    def answer(self, number: int, fails: bool) -> None:
        waiting = self.database.waiting
        answer = waiting.pop(number % len(waiting))
        if not answer.done():
            if fails:
                answer.set_exception(DatabaseUnavailable("gone"))
            else:
                answer.set_result(None)
        self.turn(4)

    # What consumers do.

    def live(self) -> list[Consumer]:
        return [
            consumer
            for consumer in self.consumers
            if not consumer.gone and consumer.outbox.closed is None
        ]

    def present(self) -> list[Consumer]:
        return [consumer for consumer in self.consumers if not consumer.gone]

    @precondition(lambda self: len(self.present()) < MAX_CONSUMERS)
    @rule(consumer=CONSUMERS)
    def connect(self, consumer: tuple[int, int, int]) -> None:
        back, filter_number, max_events = consumer
        self.open_stream(max(0, self.sequencer.head - back), filter_number, max_events)

    @precondition(lambda self: len(self.present()) < MAX_CONSUMERS)
    @precondition(lambda self: len(self.present()) < len(self.consumers))
    @rule(number=st.integers(0, 20))
    def come_back(self, number: int) -> None:
        """Whoever is gone reconnects where they stood."""
        gone = [consumer for consumer in self.consumers if consumer.gone]
        old = gone[number % len(gone)]
        filter_number = [wants for _, wants in FILTERS].index(old.wants)
        new = self.open_stream(old.position, filter_number, old.max_events)
        # One run, from the first connection on.
        new.cursor, new.received, new.outdated = old.cursor, old.received, old.outdated
        self.consumers.remove(old)

    def open_stream(self, cursor: int, filter_number: int, max_events: int) -> Consumer:
        filter, wants = FILTERS[filter_number]
        outbox = Outbox(
            self.sequencer,
            self.pages,
            self.metrics,
            client=f"client {len(self.consumers) % 2}",
            filter=filter,
            page_max_events=self.page_max_events,
            max_events=max_events,
            heartbeat_seconds=HEARTBEAT_SECONDS,
        )
        ahead = cursor > self.sequencer.head
        consumer = Consumer(outbox, cursor, wants, max_events, ahead, position=cursor)
        consumer.steps = outbox.events(cursor)
        self.consumers.append(consumer)
        return consumer

    @precondition(lambda self: self.present())
    @rule(number=st.integers(0, MAX_CONSUMERS), turns=st.integers(0, 4))
    def read(self, number: int, turns: int) -> None:
        """The socket is free: take the next step, or go on waiting for it."""
        present = self.present()
        self.start_reading(present[number % len(present)])
        self.turn(turns)

    @precondition(lambda self: self.present())
    @rule(number=st.integers(0, MAX_CONSUMERS), steps=st.integers(1, 20))
    def read_on(self, number: int, steps: int) -> None:
        """The socket takes all, and the database answers at once."""
        present = self.present()
        consumer = present[number % len(present)]
        for _ in range(steps):
            if not consumer.gone:
                self.start_reading(consumer)
                self.turn(3)
                while self.database.waiting:
                    self.answer(0, fails=False)

    @precondition(lambda self: self.live())
    @rule(number=st.integers(0, MAX_CONSUMERS))
    def stop(self, number: int) -> None:
        """The server ends a stream."""
        live = self.live()
        live[number % len(live)].outbox.close(ServerStopping("stopping"))

    @precondition(lambda self: self.present())
    @rule(number=st.integers(0, MAX_CONSUMERS))
    def hang_up(self, number: int) -> None:
        present = self.present()
        self.leave(present[number % len(present)])

    @rule(seconds=st.sampled_from([0.5, 2, HEARTBEAT_SECONDS, 60]))
    def wait(self, seconds: float) -> None:
        self.loop.now += seconds
        self.turn(3)

    def turn(self, turns: int) -> None:
        """Let whoever can go on go on, a little."""
        self.run(_turns(turns))
        for consumer in self.present():
            self.collect(consumer)

    # How the rules are carried out.

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def start_reading(self, consumer: Consumer) -> None:
        if consumer.reading is None:
            consumer.late_readings += consumer.outbox.closed is not None
            consumer.known_floor = self.sequencer.floor
            consumer.reading = self.loop.create_task(_next(consumer.steps))

    def leave(self, consumer: Consumer) -> None:
        async def hang_up() -> None:
            if consumer.reading is not None:
                consumer.reading.cancel()
                await asyncio.gather(consumer.reading, return_exceptions=True)
            await consumer.steps.aclose()

        self.run(hang_up())
        consumer.gone = True

    def collect(self, consumer: Consumer) -> None:
        reading = consumer.reading
        if reading is None or not reading.done():
            return
        consumer.reading = None
        if isinstance(reading.exception(), StreamClosed):
            assert reading.exception() is consumer.outbox.closed
            consumer.gone = True
            return
        step = reading.result()
        # What stood right before its eyes when the stream ended may still come, and no more.
        assert consumer.late_readings <= 1, f"{step} after the end"
        match step:
            case Events(chunks):
                # Whoever does not read holds a page of history at most.
                assert consumer.caught_up or sum(map(len, chunks)) <= self.page_max_events
                # Nothing below a floor that is known is read for it.
                seqs = [seq for chunk in chunks for seq in chunk.seqs]
                assert (
                    consumer.caught_up
                    or consumer.holds_page
                    or min(seqs, default=consumer.known_floor) >= consumer.known_floor
                )
                for chunk in chunks:
                    self.receive(consumer, list(chunk.seqs), chunk.data)
            case Outdated(cursor, floor):
                assert cursor == consumer.position
                # What follows is the first that is kept.
                assert any(
                    cursor + 1 < low <= floor
                    and not any(low <= seq < floor for seq in self.published)
                    for low in self.floors
                )
                consumer.outdated.append((cursor, floor))
            case CaughtUp():
                assert not consumer.caught_up
                consumer.caught_up = True
            case Silence():
                pass
        consumer.holds_page = isinstance(step, Outdated)
        # A reconnect starts from here: it never goes back, and nothing up to it may be missing.
        assert consumer.outbox.position >= consumer.position
        consumer.position = consumer.outbox.position
        self.check(consumer)

    def receive(self, consumer: Consumer, seqs: list[int], data: bytes) -> None:
        events = consumer.parser.feed(data)
        assert [dispatched.last_event_id for dispatched in events] == [str(seq) for seq in seqs]
        assert [json.loads(dispatched.data) for dispatched in events] == [
            {"seq": seq, "labels": [label_json(*make_row(seq).columns)]} for seq in seqs
        ]
        consumer.received += seqs

    def check(self, consumer: Consumer) -> None:
        """Exactly what was published after the cursor, up to the position, and was asked for."""
        possible = [
            seq
            for seq in self.published
            if consumer.cursor < seq <= consumer.position and consumer.wants(seq)
        ]
        told = [
            seq
            for seq in possible
            if not any(cursor < seq < floor for cursor, floor in consumer.outdated)
        ]
        received = set(consumer.received)
        # In order, each once, nothing else ...
        assert consumer.received == [seq for seq in possible if seq in received]
        # ... and nothing left out but what retention took, which was said.
        assert received.issuperset(told)

    def teardown(self) -> None:
        try:
            if hasattr(self, "database"):
                self.finish()
        finally:
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.run(_turns(3))
            self.run(self.loop.shutdown_asyncgens())
            self.loop.close()
        assert not left

    def finish(self) -> None:
        """Everybody who can reads to the head, then leaves; nothing of them remains."""
        self.database.open = True
        for answer in self.database.waiting:
            if not answer.done():
                answer.set_result(None)
        for _ in range(400):
            for consumer in self.present():
                if not self.has_all(consumer):
                    self.start_reading(consumer)
            self.loop.now += 1
            self.turn(4)
            if all(self.has_all(one) and one.reading is None for one in self.present()):
                break
        for consumer in self.present():
            assert self.has_all(consumer), "it waits for ever"
            self.check(consumer)
            self.leave(consumer)
        self.run(self.pages.close())
        self.run(_turns(3))
        assert not self.sequencer.subscribers
        for consumer in self.consumers:
            assert consumer.outbox.closed is None or consumer.outbox.queued == 0

    def has_all(self, consumer: Consumer) -> bool:
        at_head = consumer.position >= self.sequencer.head
        return at_head and consumer.caught_up and consumer.outbox.closed is None


async def _turns(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def _next(steps: Any) -> Step:
    step: Step = await anext(steps)
    return step


TestInEveryOrder = Delivery.TestCase
TestInEveryOrder.settings = settings(max_examples=150, stateful_step_count=40)
