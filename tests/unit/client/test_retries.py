"""When a server is asked again, and what it says in the meantime."""

from __future__ import annotations

import time
from email.utils import formatdate

import httpx
import pytest

from sse_labels.client.answers import ERROR_MAX, place_of, words, words_in
from sse_labels.client.retries import (
    HINT_MAX_SECONDS,
    STEADY_SECONDS,
    Lost,
    Refused,
    Retries,
    after_seconds,
)


def test_one_waits_as_long_as_one_wants_to() -> None:
    now = [0.0]
    retries = Retries(10, lambda: now[0])
    waits = []
    with pytest.raises(Refused, match=r"^away; given up after \d+\.\d s of waiting$"):
        waits.extend(retries.wait_seconds(Lost("away")) for _ in range(100))
    assert sum(waits) <= 10
    assert len(waits) >= 4
    retries.progress()
    assert retries.wait_seconds(Lost("away")) <= 0.5
    with pytest.raises(Refused, match="it asks to wait 60 s"):
        retries.wait_seconds(Lost("full", after_seconds=60))
    # A connection that held for long was a good one.
    retries.opened()
    now[0] = STEADY_SECONDS + 1
    assert retries.wait_seconds(Lost("away")) <= 0.5


def test_who_waits_for_ever_follows_no_hint_for_longer_than_an_hour() -> None:
    retries = Retries(None)
    retries.hint_seconds = 60
    assert 60 < retries.wait_seconds(Lost("full")) <= 61
    wait = retries.wait_seconds(Lost("full", after_seconds=10**9))
    assert HINT_MAX_SECONDS < wait <= HINT_MAX_SECONDS + 30


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7), ("soon", 0), ("", 0), ("-1", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_an_answer_asks_to_wait_in_seconds(said: str, seconds: float) -> None:
    assert after_seconds({"Retry-After": said}) == seconds


def test_an_answer_asks_to_wait_until_a_date() -> None:
    date = formatdate(time.time() + 1000, usegmt=True)
    assert 900 < after_seconds({"Retry-After": date}) <= 1000


def test_what_a_server_says_is_a_printable_line_of_bounded_length() -> None:
    said = words_in('{"error":"Bad\\n","message":"' + "x" * 10_000 + '"}', "")
    assert said == "Bad?: " + "x" * ERROR_MAX
    assert [words_in(text, "Not Found") for text in ("", "[]", "<html>")] == ["Not Found"] * 3
    assert (words(None), words(7), words("a\x1b[31m")) == ("", "7", "a?[31m")


def test_an_address_is_named_without_its_secrets() -> None:
    url = httpx.URL("http://me:secret@a.example/stream?access_token=secret#x")
    assert place_of(url) == "http://a.example/stream"
