"""The settled rule: by scenarios, and against a simulated database in every order of events.

The simulation is PostgreSQL as the rule needs to know it: a transaction locks the
sequence, then takes ids, then its rows become visible all at once, and only then
is the lock released. Between any two statements of the follower anything may happen.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sse_labels.errors import BrokenPromise, DatabaseUnavailable
from sse_labels.feed.chunk import Chunk, encode_rows
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.settled import SettledRule
from sse_labels.feed.store import TableState
from sse_labels.metrics import Metrics
from sse_labels.protocol.label import Row


def rule_at(head: int, clock: Callable[[], float] = lambda: 0.0) -> SettledRule:
    return SettledRule(head, clock)


def take(rule: SettledRule, ids: list[int], *, complete: bool = True) -> list[int]:
    """What a poll that sees `ids` publishes."""
    taken, head = rule.admit(ids, complete=complete)
    rule.publish(head)
    return ids[:taken]


class TestWithoutAHole:
    def test_a_page_that_continues_the_head_is_settled_at_once(self) -> None:
        rule = rule_at(5)
        assert take(rule, [6, 7, 8]) == [6, 7, 8]
        assert rule.head == 8
        assert rule.hole is None

    def test_an_empty_page_moves_nothing(self) -> None:
        rule = rule_at(5)
        assert take(rule, []) == []
        assert rule.head == 5

    def test_admitting_alone_does_not_move_the_head(self) -> None:
        rule = rule_at(0)
        assert rule.admit([1, 2], complete=True) == (2, 2)
        assert rule.admit([1, 2], complete=True) == (2, 2)
        assert rule.head == 0

    @pytest.mark.parametrize("ids", [[6, 6], [7, 6], [5, 6], [4], [6, 8, 7]])
    def test_ids_that_do_not_increase_break_a_promise(self, ids: list[int]) -> None:
        with pytest.raises(BrokenPromise, match="must increase"):
            rule_at(5).admit(ids, complete=True)

    def test_the_head_cannot_go_back(self) -> None:
        rule = rule_at(5)
        with pytest.raises(BrokenPromise, match="cannot go back from 5 to 4"):
            rule.publish(4)


class TestAHole:
    def test_what_commits_late_is_delivered_first_and_in_its_place(self) -> None:
        rule = rule_at(5)
        # 6 was taken by A, who is still at work; 7, 8 and 9 are there.
        assert take(rule, [7, 8, 9]) == []
        rule.open_hole(9, {"A"})
        rule.drop_ended({"A"})
        assert take(rule, [7, 8, 9]) == []
        assert rule.head == 5
        # A has committed.
        rule.drop_ended(set())
        assert take(rule, [6, 7, 8, 9]) == [6, 7, 8, 9]
        assert rule.head == 9

    def test_a_number_that_was_rolled_back_is_passed_over(self) -> None:
        rule = rule_at(5)
        rule.open_hole(9, {"A"})
        rule.drop_ended(set())
        assert rule.hole is None
        assert take(rule, [7, 8, 9]) == [7, 8, 9]

    def test_nobody_at_work_settles_the_hole_at_once(self) -> None:
        rule = rule_at(5)
        rule.open_hole(8, ())
        assert rule.hole is None
        assert take(rule, [6, 8]) == [6, 8]

    def test_the_part_before_the_hole_is_not_held_back(self) -> None:
        rule = rule_at(5)
        assert take(rule, [6, 7, 9]) == [6, 7]
        rule.open_hole(9, {"A"})
        assert take(rule, [9]) == []
        assert rule.head == 7

    def test_a_hole_that_fills_up_lets_through_what_it_held_back(self) -> None:
        rule = rule_at(0)
        rule.open_hole(4, {"A", "B"})
        # B filled 1; A holds 3 or nothing at all.
        assert take(rule, [1, 2, 4]) == [1, 2]
        assert take(rule, [3, 4]) == [3, 4]

    def test_it_waits_for_all_of_the_holders_and_for_nobody_who_came_later(self) -> None:
        rule = rule_at(0)
        rule.open_hole(3, {"A", "B"})
        rule.drop_ended({"B", "C"})
        assert rule.hole is not None
        assert rule.hole.waiting == {"B"}
        rule.drop_ended({"C", "D"})
        assert rule.hole is None
        assert take(rule, [2, 3]) == [2, 3]

    def test_a_name_that_left_and_is_seen_again_is_not_waited_for_again(self) -> None:
        rule = rule_at(0)
        rule.open_hole(3, {"A", "B"})
        rule.drop_ended({"B"})
        rule.drop_ended({"A", "B"})
        assert rule.hole is not None
        assert rule.hole.waiting == {"B"}

    def test_what_lies_above_what_was_seen_is_not_settled_with_it(self) -> None:
        rule = rule_at(0)
        rule.open_hole(3, {"A"})
        rule.drop_ended(set())
        # 5 came since; 4 may still come.
        assert take(rule, [2, 3, 5]) == [2, 3]
        assert rule.head == 3
        rule.open_hole(5, {"B"})
        assert take(rule, [5]) == []
        assert take(rule, [4, 5]) == [4, 5]

    def test_a_page_that_goes_on_behind_a_settled_hole_is_taken_whole(self) -> None:
        rule = rule_at(0)
        rule.open_hole(3, ())
        assert take(rule, [3, 4, 5]) == [3, 4, 5]

    def test_two_holes_in_a_row_are_settled_one_after_the_other(self) -> None:
        rule = rule_at(0)
        rule.open_hole(2, {"A"})
        rule.drop_ended(set())
        assert take(rule, [2, 4, 6]) == [2]
        rule.open_hole(6, {"B"})
        assert take(rule, [4, 6]) == []
        rule.drop_ended({"C"})
        assert take(rule, [4, 5, 6]) == [4, 5, 6]

    def test_two_holes_below_what_was_seen_are_settled_together(self) -> None:
        rule = rule_at(0)
        rule.open_hole(6, {"A", "B"})
        rule.drop_ended({"B"})
        assert take(rule, [2, 4, 6]) == []
        rule.drop_ended(set())
        assert take(rule, [2, 4, 6]) == [2, 4, 6]

    def test_a_hole_larger_than_a_page_stays_settled_from_page_to_page(self) -> None:
        rule = rule_at(0)
        rule.open_hole(90, ())
        # Pages of two: what was invisible before came in below 90.
        assert take(rule, [10, 20], complete=False) == [10, 20]
        assert rule.head == 20
        assert take(rule, [80, 90], complete=False) == [80, 90]
        assert take(rule, [92], complete=True) == []

    def test_a_page_that_was_cut_off_does_not_settle_what_lies_behind_its_end(self) -> None:
        rule = rule_at(0)
        rule.open_hole(90, ())
        assert rule.admit([10, 20], complete=False) == (2, 20)
        # Cut off, but something above 90 was seen: then nothing is left below.
        assert rule.admit([10, 95], complete=False) == (1, 90)

    def test_holes_at_the_settled_end_move_the_head_without_an_event(self) -> None:
        rule = rule_at(5)
        rule.open_hole(9, ())
        # The row that was seen at 9 has been taken by retention since.
        assert rule.admit([], complete=True) == (0, 9)
        assert rule.admit([10, 11], complete=True) == (2, 11)
        rule.publish(9)
        assert take(rule, [10]) == [10]

    def test_the_clock_says_since_when_it_is_open(self) -> None:
        now = 100.0
        rule = rule_at(0, lambda: now)
        rule.open_hole(3, {"A"})
        now = 160.0
        rule.drop_ended({"A"})
        assert rule.hole is not None
        assert rule.hole.since == 100.0


class TestAReconnect:
    def test_all_of_todays_holders_are_waited_for_instead_of_yesterdays(self) -> None:
        rule = rule_at(0)
        rule.open_hole(3, {"3/17"})
        # A prepared transaction came back from the crash under another name.
        rule.renew({"-1/812"})
        rule.drop_ended({"-1/812"})
        assert take(rule, [2, 3]) == []
        rule.drop_ended(set())
        assert take(rule, [1, 2, 3]) == [1, 2, 3]

    def test_a_crash_that_ended_all_of_them_settles_the_hole(self) -> None:
        rule = rule_at(0)
        rule.open_hole(3, {"A"})
        rule.renew(())
        assert rule.hole is None
        assert take(rule, [3]) == [3]

    def test_without_a_hole_there_is_nothing_to_wait_for(self) -> None:
        rule = rule_at(0)
        rule.renew({"A"})
        rule.drop_ended({"A"})
        assert rule.hole is None
        assert take(rule, [1]) == [1]


# The simulation.


class Skipped(AssertionError):
    """The follower passed an id that could still come, or that had come."""


@dataclass
class Transaction:
    """One writer: a lock on the sequence first, then numbers, then their rows."""

    name: str
    ids: list[int] = field(default_factory=list)
    rolled_back: set[int] = field(default_factory=set)
    prepared: bool = False
    slow: bool = False
    #: Visible or gone already, and the lock not yet released.
    ended: bool = False


#: Something that happens in the database, and in which transaction.
Step = tuple[str, Transaction | None]


@dataclass
class World:
    """The table, the sequence and those who write; and what the follower has published."""

    random: random.Random
    with_crashes: bool = False
    #: How many things happen before everybody ends.
    steps_left: int = 40
    visible: set[int] = field(default_factory=set)
    last_id: int = 0
    transactions: list[Transaction] = field(default_factory=list)
    names: int = 0
    published: list[int] = field(default_factory=list)
    head: int = 0
    #: Where following began: what lies at or below is history, and must be over.
    start: int = 0
    connected: bool = True
    #: Nothing happens; nothing has happened yet.
    paused: bool = False
    drained: bool = False
    history: list[str] = field(default_factory=list)

    def pass_time(self) -> None:
        """Let things happen before the follower's next statement; a crash leaves it unanswered.

        Raises DatabaseUnavailable until the follower has connected again.
        """
        if self.paused:
            return
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8, 0))):
            if self.steps_left:
                self.steps_left -= 1
                self.happen(*self.random.choice(self.possible()))
        if not self.steps_left and not self.drained:
            # Everybody ends, so that all must arrive in the end.
            for transaction in tuple(self.transactions):
                if not transaction.ended:
                    self.happen("commit", transaction)
                self.happen("release", transaction)
            self.drained = True
        if not self.connected:
            raise DatabaseUnavailable("the database crashed")

    def possible(self) -> list[Step]:
        """What can happen now; what is listed twice happens twice as often."""
        steps: list[Step] = []
        if len(self.transactions) < 6:
            steps += [("begin", None)] * 5
        for transaction in self.transactions:
            if transaction.ended:
                steps += [("release", transaction)] * 5
                continue
            if not transaction.prepared:
                steps += [("take", transaction)] * 5
            if transaction.ids:
                steps += [("commit", transaction)] * (1 if transaction.slow else 5)
                steps.append(("rollback", transaction))
            if transaction.ids and not transaction.prepared:
                steps.append(("prepare", transaction))
                if transaction.ids[-1] not in transaction.rolled_back:
                    steps.append(("savepoint", transaction))
        if self.with_crashes and self.transactions:
            steps.append(("crash", None))
        return steps

    def happen(self, what: str, transaction: Transaction | None = None) -> Transaction | None:
        self.history.append(f"{what} {transaction.name}" if transaction else what)
        match what, transaction:
            case "begin", None:
                transaction = Transaction(self.new_name(), slow=self.random.random() < 0.3)
                self.transactions.append(transaction)
            case "crash", None:
                self.crash()
            case "take", Transaction():
                self.last_id += 1
                transaction.ids.append(self.last_id)
            case "savepoint", Transaction():
                # ROLLBACK TO SAVEPOINT: the row is gone, the number and the lock stay taken.
                transaction.rolled_back.add(transaction.ids[-1])
            case "prepare", Transaction():
                transaction.prepared = transaction.slow = True
            case "commit", Transaction():
                self.visible |= set(transaction.ids) - transaction.rolled_back
                transaction.ended = True
            case "rollback", Transaction():
                transaction.ended = True
            case "release", Transaction():
                self.transactions.remove(transaction)
            case _:
                raise ValueError(what)
        return transaction

    def crash(self) -> None:
        """Only prepared transactions survive, under other names."""
        self.transactions = [
            transaction
            for transaction in self.transactions
            if transaction.prepared and not transaction.ended
        ]
        self.connected = False
        for transaction in self.transactions:
            transaction.name = self.new_name()

    def new_name(self) -> str:
        self.names += 1
        return f"{self.names}/{self.names}"

    # What the follower can ask. Time passes before each answer.

    def rows_after(self, head: int, limit: int) -> list[int]:
        self.pass_time()
        rows = sorted(seq for seq in self.visible if seq > head)[:limit]
        self.history.append(f"sees {rows}")
        return rows

    def holders(self) -> frozenset[str]:
        self.pass_time()
        names = frozenset(transaction.name for transaction in self.transactions)
        self.history.append(f"holders {sorted(names)}")
        return names

    # What must hold.

    def begin_at(self, head: int) -> None:
        """Take note of where the follower starts, and judge it."""
        self.start = self.head = head
        self.judge()

    def publish(self, ids: Sequence[int], head: int) -> None:
        """Take note of what the follower published, and judge it."""
        before = [self.head, *ids, head]
        assert before[:-1] == sorted(set(before[:-1])), "increasing, and none twice"
        assert head >= max(before)
        self.published += ids
        self.head = head
        self.history.append(f"publish {list(ids)} up to {head}")
        self.judge()

    def judge(self) -> None:
        shown = {seq for seq in self.visible if self.start < seq <= self.head}
        if missed := shown - set(self.published):
            raise Skipped(f"{missed} had come, the head is {self.head}: {self.history}")
        coming = {
            seq
            for transaction in self.transactions
            if not transaction.ended
            for seq in set(transaction.ids) - transaction.rolled_back
        }
        if passed := {seq for seq in coming if seq <= self.head}:
            raise Skipped(f"{passed} may still come, the head is {self.head}: {self.history}")
        assert self.head <= self.last_id, "a number that nobody has taken yet would be lost"

    def assert_complete(self) -> None:
        """All that was committed since the start has been published, once and in order."""
        stored = sorted(seq for seq in self.visible if seq > self.start)
        assert self.published == stored, self.history


def look(rule: SettledRule, world: World, limit: int) -> None:
    """One poll: the statements of `Sequencer._read_table`, in its order."""

    def admit(ids: list[int]) -> tuple[int, int]:
        return rule.admit(ids, complete=len(ids) < limit)

    if rule.hole is not None:
        rule.drop_ended(world.holders())
    ids = world.rows_after(rule.head, limit)
    taken, head = admit(ids)
    if taken < len(ids) and rule.hole is None:
        holders = world.holders()
        rule.open_hole(ids[-1], holders)
        if not holders:
            ids = world.rows_after(rule.head, limit)
            taken, head = admit(ids)
    if head != rule.head:
        rule.publish(head)
        world.publish(ids[:taken], head)


Look = Callable[[SettledRule, World, int], None]
MakeRule = Callable[[int, Callable[[], float]], SettledRule]


def simulate(
    world: World, limit: int, look: Look = look, make_rule: MakeRule = SettledRule
) -> None:
    """Follow a world until everybody has ended; all that was committed must have been published."""
    rule = make_rule(0, lambda: 0.0)
    while not world.drained or not world.connected:
        try:
            if not world.connected:
                # As `Sequencer._start` does after a reconnect.
                world.connected = True
                rule.renew(world.holders())
            look(rule, world, limit)
        except DatabaseUnavailable:
            continue
    # No more polls than pages, one to narrow, one to settle, one to see that it is over.
    for _ in range(len(world.visible) // limit + 4):
        look(rule, world, limit)
    world.assert_complete()


LIMITS = (1, 2, 3, 5, 100)
randoms = st.randoms(use_true_random=False)


class TestInEveryOrder:
    @settings(max_examples=150)
    @given(randoms, st.integers(0, 30), st.sampled_from(LIMITS))
    def test_every_committed_id_is_admitted_once_in_order_and_never_too_early(
        self, random: random.Random, steps: int, limit: int
    ) -> None:
        simulate(World(random, steps_left=steps), limit)

    @settings(max_examples=150)
    @given(randoms, st.integers(0, 30), st.sampled_from(LIMITS))
    def test_crashes_of_the_database_change_nothing_about_that(
        self, random: random.Random, steps: int, limit: int
    ) -> None:
        simulate(World(random, with_crashes=True, steps_left=steps), limit)

    @pytest.mark.parametrize("with_crashes", [False, True])
    def test_nor_does_any_of_many_longer_runs(self, with_crashes: bool) -> None:
        for seed in range(500):
            world = World(random.Random(seed), with_crashes, steps_left=100)
            simulate(world, LIMITS[seed % len(LIMITS)])

    def test_writers_who_always_overlap_do_not_hold_a_hole_open_for_ever(self) -> None:
        """Somebody always holds the lock; those who came after the hole are not waited for."""
        world = World(random.Random(0), steps_left=0, drained=True)
        rule = rule_at(0)
        slow, quick = world.happen("begin"), world.happen("begin")
        for what, who in [("take", slow), ("take", quick), ("commit", quick), ("release", quick)]:
            world.happen(what, who)
        look(rule, world, 100)
        later = []
        for _ in range(5):
            later.append(world.happen("begin"))
            world.happen("take", later[-1])
            look(rule, world, 100)
        assert world.published == []
        world.happen("rollback", slow)
        world.happen("release", slow)
        look(rule, world, 100)
        assert world.published == [2]


# The same with the sequencer itself, which must ask in that order.


class Done(Exception):
    """Everybody has ended, and the sequencer has had time enough."""


class WorldStore:
    """The store's questions, answered by a world; also the connection and the subscriber."""

    def __init__(self, world: World, limit: int) -> None:
        self.world = world
        self.polls_left: int | None = None
        self.limit = limit
        self.following = False
        self.schema = self

    async def check(self) -> None:
        self.world.pass_time()

    async def state(self) -> TableState:
        return TableState(floor=1, epoch=None)

    async def dedicated(self) -> Any:
        self.world.connected = True
        return self

    def close(self) -> None:
        """The connection's end."""

    async def newest(self, _connection: Any) -> int:
        self.world.pass_time()
        return self.world.last_id

    async def sequence_holders(self, _connection: Any) -> frozenset[str]:
        return self.world.holders()

    chunk = staticmethod(encode_rows)

    async def rows_after(self, _connection: Any, head: int, limit: int) -> list[Row]:
        if not self.following:
            self.following = True
            self.world.paused = False
            self.world.begin_at(head)
        assert head == self.world.head
        if self.world.drained:
            # As in `simulate`, and for each hole a second read.
            if self.polls_left is None:
                self.polls_left = 2 * len(self.world.visible) // limit + 6
            if self.polls_left == 0:
                raise Done
            self.polls_left -= 1
        ids = self.world.rows_after(head, limit)
        return [Row(seq, "did:plc:a", "at://b", "", "spam", None, "t", None, None) for seq in ids]

    async def commit_age(self, _connection: Any, _seq: int) -> None:
        self.world.pass_time()

    def push(self, chunk: Chunk) -> None:
        assert chunk.start == self.world.head
        self.world.publish(chunk.seqs, chunk.end)


class ScriptedWorld(World):
    """A world in which it is written down what happens before which question."""

    def __init__(self) -> None:
        super().__init__(random.Random(0))
        self.script: list[tuple[str, Callable[[], None]]] = []
        self.unexpected = 0

    def pass_time(self) -> None:
        pass

    def holders(self) -> frozenset[str]:
        self.play("holders")
        return super().holders()

    def rows_after(self, head: int, limit: int) -> list[int]:
        self.play("rows")
        return super().rows_after(head, limit)

    def play(self, question: str) -> None:
        if self.script and self.script[0][0] == question:
            self.script.pop(0)[1]()
            self.unexpected = 0
        else:
            self.unexpected += 1
            assert not self.script or self.unexpected < 20, f"it never asks for {self.script[0][0]}"
        self.drained = not self.script

    def take(self, who: Transaction) -> None:
        if who not in self.transactions:
            self.transactions.append(who)
        self.happen("take", who)

    def end(self, who: Transaction, how: str = "commit") -> None:
        self.happen(how, who)
        self.happen("release", who)


def nothing() -> None:
    """Nothing happens before this question."""


async def follow(store: Any) -> None:
    """Let a real sequencer follow a world to its end."""
    sequencer = Sequencer(
        store,
        Metrics(),
        page_max_events=store.limit,
        ring_max_bytes=2**20,
        poll_seconds=0,
        gather_seconds=0,
        clock=lambda: 0.0,
    )
    sequencer.subscribers.add(store, None)
    with pytest.raises(Done):
        await sequencer.run()
    assert sequencer.head == store.world.head
    store.world.assert_complete()


class TestTheSequencer:
    @pytest.mark.parametrize("with_crashes", [False, True])
    async def test_it_follows_every_world_as_the_rule_wants_it(
        self,
        with_crashes: bool,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr("sse_labels.feed.sequencer.Backoff", lambda: NoWait())
        caplog.set_level(logging.CRITICAL)
        for seed in range(120):
            # Half of them start in the middle of writing, the others before it.
            world = World(random.Random(seed), with_crashes, steps_left=100, paused=seed % 2 == 0)
            await follow(WorldStore(world, LIMITS[seed % len(LIMITS)]))

    async def test_who_commits_between_the_page_and_the_question_for_holders_is_not_lost(
        self,
    ) -> None:
        world = ScriptedWorld()
        slow, quick = Transaction("slow"), Transaction("quick")

        def make_hole() -> None:
            world.take(slow)
            world.take(quick)
            world.end(quick)

        world.script = [
            # The first question comes before the start, and finds nobody.
            ("holders", nothing),
            ("rows", make_hole),
            ("holders", lambda: world.end(slow)),
        ]
        await follow(WorldStore(world, 100))
        assert world.published == [1, 2]

    async def test_writers_who_always_overlap_do_not_keep_it_from_starting(self) -> None:
        world = ScriptedWorld()
        first, second = Transaction("first"), Transaction("second")
        world.take(first)

        def relieve() -> None:
            # The lock is never free; but the second took its id after the start.
            world.take(second)
            world.end(first)

        world.script = [
            ("holders", nothing),
            ("holders", relieve),
            ("rows", lambda: world.end(second)),
        ]
        await follow(WorldStore(world, 100))
        assert (world.start, world.published) == (1, [2])

    async def test_writers_who_always_overlap_do_not_hold_a_hole_open(self) -> None:
        world = ScriptedWorld()
        slow, quick, third = (Transaction(name) for name in ("slow", "quick", "third"))

        def make_hole() -> None:
            world.take(slow)
            world.take(quick)
            world.end(quick)

        def expect_the_hole_to_be_settled() -> None:
            assert world.published == [2]
            world.end(third)

        world.script = [
            # The first question comes before the start, and finds nobody.
            ("holders", nothing),
            ("rows", make_hole),
            ("holders", nothing),
            ("holders", lambda: world.take(third)),
            ("rows", nothing),
            ("holders", lambda: world.end(slow, "rollback")),
            ("rows", nothing),
            ("rows", expect_the_hole_to_be_settled),
        ]
        await follow(WorldStore(world, 100))
        assert world.published == [2, 3]


class NoWait:
    """A backoff that does not wait."""

    def reset(self) -> None:
        pass

    def next(self) -> float:
        return 0.0


# Wrong rules: each one must be found out, or the simulation proves nothing.


class LastSeen(SettledRule):
    """`id > last`: everything that is visible goes out."""

    def admit(self, ids: Any, *, complete: bool) -> tuple[int, int]:
        return len(ids), ids[-1] if ids else self.head


class SettlesWhatItHasNotSeen(SettledRule):
    """Holes above `hi` count as settled too."""

    def drop_ended(self, holders: Iterable[str]) -> None:
        if self.hole is not None:
            super().drop_ended(holders)
            if self.hole is None:
                self._settled_through += 1


class FirstToLeave(SettledRule):
    """Does not wait for all of W."""

    def drop_ended(self, holders: Iterable[str]) -> None:
        if self.hole is not None and len(self.hole.waiting & frozenset(holders)) < len(
            self.hole.waiting
        ):
            holders = ()
        super().drop_ended(holders)


class ForgetsTheCut(SettledRule):
    """Takes a page that was cut off by its limit for the whole."""

    def admit(self, ids: Any, *, complete: bool) -> tuple[int, int]:
        return super().admit(ids, complete=True)


class NeverRenews(SettledRule):
    """Keeps yesterday's names after a reconnect."""

    def renew(self, holders: Iterable[str]) -> None:
        pass


def settles_without_rereading(rule: SettledRule, world: World, limit: int) -> None:
    """Takes the page that showed the hole for what is there once the hole is settled."""
    if rule.hole is not None:
        rule.drop_ended(world.holders())
    ids = world.rows_after(rule.head, limit)
    taken, head = rule.admit(ids, complete=len(ids) < limit)
    if taken < len(ids) and rule.hole is None:
        rule.open_hole(ids[-1], world.holders())
        taken, head = rule.admit(ids, complete=len(ids) < limit)
    if head != rule.head:
        rule.publish(head)
        world.publish(ids[:taken], head)


def narrows_after_the_page(rule: SettledRule, world: World, limit: int) -> None:
    """Asks who has ended only after it has read the rows."""
    ids = world.rows_after(rule.head, limit)
    if rule.hole is not None:
        rule.drop_ended(world.holders())
    taken, head = rule.admit(ids, complete=len(ids) < limit)
    if taken < len(ids) and rule.hole is None:
        rule.open_hole(ids[-1], world.holders())
        return
    if head != rule.head:
        rule.publish(head)
        world.publish(ids[:taken], head)


def asks_for_holders_before_the_page(rule: SettledRule, world: World, limit: int) -> None:
    """Who takes an id between the two statements is not waited for."""
    holders = world.holders()
    rule.drop_ended(holders)
    ids = world.rows_after(rule.head, limit)
    taken, head = rule.admit(ids, complete=len(ids) < limit)
    if taken < len(ids) and rule.hole is None:
        rule.open_hole(ids[-1], holders)
        return
    if head != rule.head:
        rule.publish(head)
        world.publish(ids[:taken], head)


class TestTheSimulationItself:
    @pytest.mark.parametrize(
        "make_rule", [LastSeen, SettlesWhatItHasNotSeen, FirstToLeave, ForgetsTheCut, NeverRenews]
    )
    def test_it_finds_out_a_wrong_rule(self, make_rule: MakeRule) -> None:
        assert is_found_out(look, make_rule)

    @pytest.mark.parametrize(
        "wrong_look",
        [
            settles_without_rereading,
            narrows_after_the_page,
            asks_for_holders_before_the_page,
        ],
    )
    def test_it_finds_out_a_wrong_order_of_statements(self, wrong_look: Look) -> None:
        assert is_found_out(wrong_look, SettledRule)


def is_found_out(look: Look, make_rule: MakeRule) -> bool:
    """Try the same runs every time, until one shows what is wrong."""
    for seed in range(3000):
        world = World(random.Random(seed), with_crashes=seed % 2 == 0, steps_left=100)
        try:
            simulate(world, LIMITS[seed % len(LIMITS)], look, make_rule)
        except AssertionError:
            return True
    return False
