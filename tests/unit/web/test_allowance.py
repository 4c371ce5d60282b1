"""What a WebSocket's client may send, by the clock."""

from __future__ import annotations

from sse_labels.web.door.connection import (
    CHATTER_BYTES_PER_SECOND,
    CHATTER_MAX_BYTES,
    Allowance,
)


def test_a_client_that_pings_for_days_is_never_cut() -> None:
    now = 0.0
    allowance = Allowance(lambda: now)
    for _ in range(100_000):
        now += 131 / CHATTER_BYTES_PER_SECOND
        assert allowance.take(131)


def test_what_was_saved_up_is_bounded() -> None:
    now = 0.0
    allowance = Allowance(lambda: now)
    now = 86_400.0
    assert allowance.take(CHATTER_MAX_BYTES)
    assert not allowance.take(1)


def test_a_client_that_sends_on_and_on_is_cut() -> None:
    now = 0.0
    allowance = Allowance(lambda: now)
    sent = 0
    while allowance.take(100):
        sent += 100
        now += 0.01
    # 100 bytes each 10 ms, of which the allowance grows by 10.
    assert CHATTER_MAX_BYTES < sent < 1.2 * CHATTER_MAX_BYTES
