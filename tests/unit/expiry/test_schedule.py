"""The schedule against a plain list: all up to its end comes out once, in order, within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sse_labels.expiry.schedule import Due, Schedule
from sse_labels.protocol.seq import SEQ_MAX

BEGIN = Due(0.0, SEQ_MAX)
END = Due(100.0, SEQ_MAX)
DUES = st.builds(Due, st.integers(1, 120).map(float), st.integers(1, 50))


def scheduled(*dues: Due, most: int = 1000) -> Schedule:
    schedule = Schedule(BEGIN, most)
    schedule.extend(dues, END)
    return schedule


def test_what_is_due_comes_in_order_and_the_rest_waits() -> None:
    schedule = scheduled(Due(3, 1), Due(1, 2), Due(2, 3), Due(1, 1))
    assert schedule.next_at == 1
    assert schedule.pop(0.9, 10) == []
    assert schedule.pop(2, 2) == [Due(1, 1), Due(1, 2)]
    assert schedule.pop(2, 2) == [Due(2, 3)]
    assert len(schedule) == 1
    assert schedule.pop(99, 2) == [Due(3, 1)]
    assert schedule.next_at is None


def test_what_lies_beyond_the_end_is_not_taken() -> None:
    schedule = Schedule(BEGIN, 10)
    assert not schedule.add(Due(1, 1))
    schedule.extend((), END)
    assert schedule.add(Due(1, 1))
    assert not schedule.add(Due(100.1, 1))
    assert len(schedule) == 1


def test_what_came_late_is_taken_and_is_due_at_once() -> None:
    schedule = scheduled()
    assert schedule.add(Due(-5, 1))
    assert schedule.pop(0, 10) == [Due(-5, 1)]


@given(st.lists(DUES, max_size=60))
def test_added_twice_comes_once(dues: list[Due]) -> None:
    schedule = scheduled(*dues, *dues)
    assert schedule.pop(1000, 1000) == sorted({due for due in dues if due <= END})


@given(st.lists(DUES, max_size=60), st.integers(4, 20))
def test_a_full_schedule_has_all_up_to_a_nearer_end(dues: list[Due], most: int) -> None:
    schedule = scheduled(most=most)
    for due in dues:
        schedule.add(due)
        assert len(schedule) <= most
    wanted = sorted({due for due in dues if due <= schedule.end})
    if len(dues) <= most:
        assert schedule.end == END
    assert schedule.pop(1000, 1000) == wanted


@given(st.lists(DUES, max_size=60), DUES)
def test_shortened_it_keeps_what_lies_before_and_an_end_never_moves_away(
    dues: list[Due], end: Due
) -> None:
    schedule = scheduled(*dues)
    schedule.shorten(end)
    assert schedule.end == min(end, END)
    assert schedule.pop(1000, 1000) == sorted({due for due in dues if due <= schedule.end})
