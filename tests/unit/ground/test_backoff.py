"""Waits between tries: they grow, spread out, and stay within the bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.backoff import Backoff


def test_each_wait_lies_in_the_upper_half_of_a_ceiling_that_doubles() -> None:
    backoff = Backoff(first=1.0, longest=100.0)
    for ceiling in (1, 2, 4, 8, 16, 32, 64):
        assert ceiling / 2 <= backoff.next() <= ceiling


@given(st.floats(0.001, 10), st.floats(1, 1000), st.integers(1, 60))
def test_no_wait_is_longer_than_the_bound(first: float, factor: float, tries: int) -> None:
    backoff = Backoff(first, first * factor)
    waits = [backoff.next() for _ in range(tries)]
    assert all(first / 2 <= wait <= first * factor for wait in waits)
    # Having come to the bound, it stays near it.
    assert backoff.next() >= min(first * 2**tries, first * factor) / 2


def test_a_success_starts_again_from_the_shortest_wait() -> None:
    backoff = Backoff(first=1.0, longest=100.0)
    for _ in range(5):
        backoff.next()
    backoff.reset()
    assert backoff.next() <= 1.0
    assert 1.0 <= backoff.next() <= 2.0


def test_the_waits_of_many_who_failed_together_spread_out() -> None:
    waits = [Backoff(first=1.0, longest=1.0).next() for _ in range(200)]
    for low in (0.5, 0.625, 0.75, 0.875):
        # A fifty in each quarter on average; none at all has a chance of 4 in 10^25.
        assert any(low <= wait <= low + 0.125 for wait in waits)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_defaults_try_again_soon_and_then_every_few_seconds(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The ends of the range, instead of a random place in it.
    monkeypatch.setattr("random.uniform", lambda low, high: (low, high)[seed])
    backoff = Backoff()
    waits = [backoff.next() for _ in range(9)]
    highest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert waits == pytest.approx([wait * (0.5, 1.0)[seed] for wait in highest])
