"""What processes know of each other; here several views in one process stand for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sse_labels.errors import RateLimited, TooManyFromAddress
from sse_labels.metrics import COUNTERS, Metrics
from sse_labels.shared import Memory, Share
from sse_labels.shared import memory as layout
from sse_labels.shared.counts import RATE_PROBES, Rates, Tally
from sse_labels.shared.memory import AHEAD, SNAPSHOT_MAX_BYTES
from sse_labels.web.addresses import PerAddress
from sse_labels.web.rate import PublishRate


@pytest.fixture
def memory() -> Iterator[Memory]:
    with closing(Memory.create(3)) as made:
        yield made


@pytest.fixture
def shares(memory: Memory) -> list[Share]:
    """Each mapped for itself, as by processes."""
    return [Memory(memory.descriptor, 3).share(index) for index in range(3)]


class TestPlaces:
    def test_connections_that_each_may_hold_are_added_up_while_it_lives(
        self, memory: Memory, shares: list[Share]
    ) -> None:
        assert shares[0].allowed() == 0
        for share in shares:
            share.allow(700)
        assert [share.allowed() for share in shares] == [2100] * 3
        memory.forget(1)
        assert [share.allowed() for share in shares] == [1400] * 3

    def test_all_together_hold_no_more_than_allowed(self, shares: list[Share]) -> None:
        taken = [shares[number % 3].streams.take(7) for number in range(12)]
        assert taken == [True] * 7 + [False] * 5
        assert [share.streams.here for share in shares] == [3, 2, 2]
        assert {share.streams.everywhere() for share in shares} == {7}
        shares[1].streams.give_back()
        assert shares[2].streams.take(7)
        assert not shares[0].streams.take(7)

    def test_streams_and_connections_are_counted_apart(self, shares: list[Share]) -> None:
        assert shares[0].streams.take(1)
        assert shares[1].connections.take(1)
        assert not shares[2].streams.take(1)

    def test_of_two_that_come_at_once_none_overlooks_the_other(self) -> None:
        came: list[bool] = []

        class LookedAt(list):  # type: ignore[type-arg]
            """One process's number; the moment another has looked at it, it takes a place."""

            def __getitem__(self, index: object) -> int:
                number = int(super().__getitem__(0))
                if not came:
                    came.append(True)
                    came[0] = second.take(1)
                return number

        first_number, second_number = [0], LookedAt([0])
        second = Tally(second_number, [first_number])
        taken = Tally(first_number, [second_number]).take(1)
        assert [taken, came[0]] == [True, False]
        assert (first_number[0], *second_number) == (1, 0)

    def test_what_a_dead_process_held_is_free(self, memory: Memory, shares: list[Share]) -> None:
        assert shares[0].streams.take(1)
        shares[0].streams_by_address.add("192.0.2.1", 1)
        shares[0].serving = True
        assert shares[1].streams_by_address.elsewhere("192.0.2.1") == 1
        memory.forget(0)
        assert shares[1].streams.take(1)
        assert shares[1].streams_by_address.elsewhere("192.0.2.1") == 0
        assert not shares[0].serving

    def test_alone_a_process_counts_by_itself(self) -> None:
        tally = Tally.alone()
        assert [tally.take(2) for _ in range(3)] == [True, True, False]
        tally.give_back()
        assert tally.take(2)


class TestAddresses:
    def test_one_address_holds_no_more_than_it_may_in_all(self, shares: list[Share]) -> None:
        doors = [PerAddress(5, lambda _: False, share.streams_by_address) for share in shares]
        keys = [doors[number % 3].take("192.0.2.1") for number in range(5)]
        for door in doors:
            with pytest.raises(TooManyFromAddress):
                door.take("192.0.2.1")
            door.give_back(door.take("192.0.2.2"))
        doors[0].give_back(keys[0])
        doors[2].take("192.0.2.1")
        with pytest.raises(TooManyFromAddress):
            doors[1].take("192.0.2.1")

    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=60))
    def test_others_are_never_counted_too_low(self, taken: list[tuple[int, int]]) -> None:
        with closing(Memory.create(3)) as memory:
            shares = [memory.share(index) for index in range(3)]
            for process, address in taken:
                shares[process].connections_by_address.add(f"2001:db8:{address}::/64", 1)
            for process, share in enumerate(shares):
                for address in range(6):
                    held = sum(1 for one in taken if one[0] != process and one[1] == address)
                    key = f"2001:db8:{address}::/64"
                    assert share.connections_by_address.elsewhere(key) >= held
            for process, address in taken:
                shares[process].connections_by_address.add(f"2001:db8:{address}::/64", -1)
            assert not any(memory.part(0)[layout._WORDS_BYTES :][: layout._CELLS_BYTES])

    @pytest.mark.parametrize(("clients", "most", "refused"), [(8000, 4, 0), (8000, 1, 300)])
    def test_many_addresses_are_not_taken_for_one(
        self, clients: int, most: int, refused: int
    ) -> None:
        """As many as a full server of two processes has, the others' half."""
        with closing(Memory.create(2)) as memory:
            memory._view[: layout._SECRET_BYTES] = bytes(range(layout._SECRET_BYTES))
            here, there = (memory.share(index).streams_by_address for index in range(2))
            for number in range(clients):
                there.add(f"2001:db8:{number:x}::/64", 1)
            shown = (here.elsewhere(f"2001:db8:{n:x}:1::/64") for n in range(clients))
            assert sum(held >= most for held in shown) <= refused

    def test_addresses_meet_elsewhere_in_each_run(self) -> None:
        cells = []
        for _ in range(2):
            with closing(Memory.create(1)) as memory:
                tally = memory.share(0).streams_by_address
                cells.append([sorted(tally._cells(f"192.0.2.{n}")) for n in range(20)])
        assert cells[0] != cells[1]


class TestBalance:
    def test_who_holds_clearly_more_lets_those_accept_that_serve(self, shares: list[Share]) -> None:
        one, other, _ = shares
        for _ in range(AHEAD + 1):
            assert not one.yields()
            one.connections.take(100)
        # Nobody else serves yet.
        assert not one.yields()
        other.serving = True
        assert one.yields()
        assert not other.yields()
        other.connections.take(100)
        assert not one.yields()

    def test_with_many_the_difference_may_be_larger(self, shares: list[Share]) -> None:
        one, other, _ = shares
        other.serving = True
        for _ in range(1600):
            one.connections.take(10_000)
        for _ in range(1600 - 100 - AHEAD):
            other.connections.take(10_000)
        assert not one.yields()
        one.connections.take(10_000)
        assert one.yields()

    def test_nobody_waits_for_one_that_takes_none(self, shares: list[Share]) -> None:
        one, stuck, _ = shares
        stuck.serving = True
        for _ in range(50):
            one.connections.take(100)
        assert one.yields()
        for _ in range(3):
            assert not one.yields()
            one.connections.take(100)
        # It was only busy.
        stuck.connections.take(100)
        assert one.yields()

    def test_one_that_is_stuck_hides_nobody_who_is_behind(self, shares: list[Share]) -> None:
        one, stuck, new = shares
        stuck.serving = new.serving = True
        for _ in range(50):
            one.connections.take(100)
        for _ in range(20):
            assert one.yields()
            assert not one.yields()
            new.connections.take(100)


class TestRates:
    def test_publisher_has_one_rate_in_all_processes(self, shares: list[Share]) -> None:
        rates = [PublishRate(1, 10, share.rates) for share in shares]
        for rate in rates:
            rate.take("alice", 3)
        for rate in rates:
            with pytest.raises(RateLimited):
                rate.take("alice", 2)
            rate.take("bob", 3)
        rates[0].take("alice", 1)

    def test_processes_that_publish_at_the_same_time_miss_nothing(self, memory: Memory) -> None:
        code = (
            "import sys; from sse_labels.shared import Memory\n"
            "from sse_labels.web.rate import PublishRate\n"
            "from sse_labels.errors import RateLimited\n"
            "rate = PublishRate(1, 2000, Memory(int(sys.argv[1]), 3).share(0).rates)\n"
            "taken = 0\n"
            "sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read(1)\n"
            "for _ in range(1900):\n"
            "    try: rate.take('alice', 1); taken += 1\n"
            "    except RateLimited: pass\n"
            "print(taken)\n"
        )
        both = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(memory.descriptor)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory.descriptor],
            )
            for _ in range(2)
        ]  # fmt: skip
        for process in both:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"."
        taken = [int(process.communicate(b"\n", timeout=30)[0]) for process in both]
        # It took less than three seconds.
        assert 2000 <= sum(taken) <= 2003

    def test_nobody_waits_for_ever_for_one_that_was_stopped(self, memory: Memory) -> None:
        code = (
            "import sys; from sse_labels.shared import Memory\n"
            "with Memory(int(sys.argv[1]), 3).share(0).rates:\n"
            "    sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read(1)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(memory.descriptor)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory.descriptor],
        ) as stopped:  # fmt: skip
            assert stopped.stdout is not None
            assert stopped.stdout.read(1) == b"."
            rate = PublishRate(1, 10, memory.share(1).rates)
            rate.take("alice", 6)
            with pytest.raises(RateLimited):
                rate.take("alice", 6)
            stopped.communicate(b"\n", timeout=30)

    def test_publisher_whose_time_is_over_makes_room(self, memory: Memory) -> None:
        rates = Rates(memory.rates, memory.descriptor, memory.secret)
        rates._id = lambda name: int(name)  # type: ignore[method-assign]
        for number in range(RATE_PROBES):
            # All of them may stand in the same rows.
            rates.set(str(1 + number * layout.RATES_BYTES), 100.0 + number, now=0.0)
        first, last = "1", str(1 + (RATE_PROBES - 1) * layout.RATES_BYTES)
        assert (rates.get(first), rates.get(last)) == (100.0, 100.0 + RATE_PROBES - 1)
        new = str(1 + RATE_PROBES * layout.RATES_BYTES)
        assert rates.get(new) is None
        rates.set(new, 500.0, now=50.0)
        assert (rates.get(new), rates.get(first)) == (500.0, None)
        rates.set(new, 501.0, now=50.0)
        assert rates.get(new) == 501.0
        assert rates.get(last) is not None


class TestSnapshots:
    def test_what_was_written_last_is_read_whole(self, shares: list[Share]) -> None:
        assert shares[0].read_others() == [({}, False), ({}, False)]
        for number in range(5):
            shares[1].write({"a": [("a_total", {"how": 'x"\n'}, number)]})
            assert shares[0].read_others()[0] == (
                {"a": [["a_total", {"how": 'x"\n'}, number]]},
                True,
            )
        assert shares[2].read_mine() == {}

    def test_one_that_its_writer_did_not_finish_is_not_seen(
        self, memory: Memory, shares: list[Share]
    ) -> None:
        shares[1].write({"a": [("a", {}, 1)]})
        # Killed in the midst of the next one: its half is torn, and the word still says the other.
        half = shares[1]._half(1, 2)
        half[:100] = b"x" * 100
        memory.forget(1)
        assert shares[0].read_others()[0] == ({"a": [["a", {}, 1]]}, False)

    def test_one_that_changes_while_it_is_read_is_not_taken(self, shares: list[Share]) -> None:
        shares[1].write({"a": [("a", {}, 1)]})
        assert shares[0].read_others()[0][0]
        shares[1]._half(1, 1)[20:30] = b"x" * 10
        assert shares[0].read_others()[0] == ({"a": [["a", {}, 1]]}, True)

    def test_one_that_is_too_large_is_refused(self, shares: list[Share]) -> None:
        with pytest.raises(ValueError, match="bytes"):
            shares[0].write({"a": [("x" * SNAPSHOT_MAX_BYTES, {}, 1)]})
        assert shares[0].read_mine() == {}


def scrape(metrics: Metrics) -> dict[str, float]:
    text = metrics.render().decode()
    helps = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) == len(set(helps))
    return {
        "|".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestMetrics:
    def test_every_process_shows_what_all_have_counted(self, shares: list[Share]) -> None:
        all_metrics = [Metrics(share) for share in shares]
        for number, metrics in enumerate(all_metrics, start=1):
            metrics.events_delivered += 10**number
            metrics.streams_ended["ClientGone"] += number
            metrics.gauges["streams"] = lambda number=number: number
            metrics.gauges["head_seq"] = lambda number=number: 100 + number
            metrics.gauges["streams_limit"] = lambda: 50
            metrics.fanout_seconds.observe(0.003)
            metrics.show()
        all_metrics[2].requests_refused["Forbidden"] += 1
        all_metrics[2].show()
        for metrics in all_metrics:
            shown = scrape(metrics)
            assert shown["sse_labels_events_delivered_total"] == 1110
            assert shown["sse_labels_streams_ended_total|ClientGone"] == 6
            assert shown["sse_labels_requests_refused_total|Forbidden"] == 1
            assert shown["sse_labels_streams"] == 6
            assert shown["sse_labels_streams_limit"] == 50
            for name in ("process_open_fds", "process_max_fds", "process_resident_memory_bytes"):
                assert all(shown[f"{name}|{n}"] > 0 for n in (1, 2, 3))
            assert [shown[f"sse_labels_head_seq|{n}"] for n in (1, 2, 3)] == [101, 102, 103]
            assert shown["sse_labels_commit_to_fanout_seconds_count"] == 3
            assert shown["sse_labels_commit_to_fanout_seconds_bucket|0.005"] == 3
            assert shown["sse_labels_commit_to_fanout_seconds_bucket|0.002"] == 0
            for name in COUNTERS:
                assert f"sse_labels_{name}_total" in shown

    def test_counts_outlive_their_process_and_gauges_do_not(
        self, memory: Memory, shares: list[Share]
    ) -> None:
        one, other = Metrics(shares[0]), Metrics(shares[1])
        one.events_delivered += 5
        one.gauges["streams"] = lambda: 3
        one.show()
        other.events_delivered += 1
        assert scrape(other)["sse_labels_streams"] == 3
        for life in range(2):
            memory.forget(0)
            shown = scrape(other)
            assert shown["sse_labels_events_delivered_total"] == 6 + life
            assert shown["sse_labels_streams"] == 0
            assert "sse_labels_head_seq|1" not in shown
            # The next in its place goes on counting where it ended.
            again = Metrics(Memory(memory.descriptor, 3).share(0))
            assert scrape(other)["sse_labels_events_delivered_total"] == 6 + life
            again.events_delivered += 1
            assert scrape(again)["sse_labels_events_delivered_total"] == 7 + life
            assert scrape(other)["sse_labels_events_delivered_total"] == 7 + life
