"""How fast one publisher may publish."""

from __future__ import annotations

import pytest

from sse_labels.errors import PayloadTooLarge, RateLimited
from sse_labels.publishing.rate import PublishRate


class Clock:
    """The monotonic clock that the rate counts by."""

    now = 1000.0

    def __call__(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def retry_after(rate: PublishRate, labels: int, publisher: str = "alice") -> int:
    with pytest.raises(RateLimited) as refused:
        rate.take(publisher, labels)
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": str(refused.value.after_seconds)}
    return refused.value.after_seconds


def test_burst_is_accepted_and_then_so_many_labels_per_second(clock: Clock) -> None:
    rate = PublishRate(10, 100, clock)
    rate.take("alice", 60)
    rate.take("alice", 40)
    accepted = 0
    for _ in range(1000):
        clock.now += 0.01
        try:
            rate.take("alice", 1)
        except RateLimited:
            continue
        accepted += 1
    assert 99 <= accepted <= 100


def test_who_waits_as_told_is_accepted(clock: Clock) -> None:
    rate = PublishRate(10, 100, clock)
    rate.take("alice", 100)
    for labels in (1, 5, 12, 33, 100):
        seconds = retry_after(rate, labels)
        assert seconds == max(1, -(-labels // 10))
        clock.now += seconds + 0.001
        rate.take("alice", labels)
        # Start the next round empty.
        with pytest.raises(RateLimited):
            while True:
                rate.take("alice", 1)


def test_refused_labels_cost_nothing(clock: Clock) -> None:
    rate = PublishRate(10, 100, clock)
    rate.take("alice", 90)
    for _ in range(5):
        assert retry_after(rate, 50) == 4
    rate.take("alice", 10)


def test_publishers_do_not_share_a_rate(clock: Clock) -> None:
    rate = PublishRate(1, 10, clock)
    rate.take("alice", 10)
    rate.take("bob", 10)
    assert retry_after(rate, 3) == retry_after(rate, 3, "bob") == 3


def test_idle_publisher_saves_no_more_than_a_burst(clock: Clock) -> None:
    rate = PublishRate(10, 100, clock)
    rate.take("alice", 100)
    clock.now += 86_400
    rate.take("alice", 100)
    assert retry_after(rate, 1) == 1


def test_more_than_a_burst_is_refused_for_good() -> None:
    with pytest.raises(PayloadTooLarge, match="at most 100"):
        PublishRate(10, 100).take("alice", 101)


def test_without_a_rate_everything_is_accepted() -> None:
    rate = PublishRate(None, 1)
    for _ in range(100):
        rate.take("alice", 1_000_000)


def test_of_too_many_publishers_the_one_that_was_quiet_longest_is_forgotten(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_labels.publishing.rate.MAX_PUBLISHERS", 2)
    rate = PublishRate(1, 10, clock)
    for publisher in ("alice", "bob", "alice", "carol"):
        rate.take(publisher, 5)
    assert retry_after(rate, 1) == 1
    rate.take("bob", 10)


@pytest.mark.parametrize("per_second", [1, 3, 7, 999_983])
def test_a_burst_in_many_parts_is_one_burst(clock: Clock, per_second: int) -> None:
    rate = PublishRate(per_second, 1000, clock)
    for _ in range(1000):
        rate.take("alice", 1)
    assert retry_after(rate, 1) == 1
