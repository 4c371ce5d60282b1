"""Cursors and filters as requests carry them: exactly what was meant, or a 400 that names it."""

from __future__ import annotations

import re
from math import inf
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

from sse_labels.errors import InvalidRequest
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.web import parameters
from sse_labels.web.parameters import (
    COMPARED_MAX,
    LAST_EVENT_ID,
    QUERY_PARAMETERS,
    STREAM_PARAMETERS,
    STREAMS_PARAMETERS,
    check_encoding,
    check_parameters,
    expired_since,
    parse_cursor,
    position_asked,
    request_filter,
    stream_cursor,
    whole_number,
)

#: Digits for Python's `int`, `isdigit` or `isdecimal`, or for somebody's parser, and not for us.
LOOKALIKES = "٣５²①𝟛+-_. \t\n\x00\x1f\x85\u2028\ufeff\ud800eExXoObBaAnNiIfF,'"
texts = st.one_of(
    st.text(st.sampled_from("0123456789")),
    st.text(st.sampled_from("0123456789" + LOOKALIKES)),
    st.text(st.characters(exclude_categories=())),
    st.integers(-(2**64), 2**64).map(str),
    st.integers(0, 2**64).map(lambda number: f"{number:024}"[-19:]),
)
#: HTTP carries bytes: what aiohttp hands on of them is text in UTF-8, and escapes for the rest.
sent_texts = texts.filter(lambda text: not any("\ud800" <= one <= "\udfff" for one in text))


def meant(text: str) -> int | None:
    """The number that a text of ASCII digits, and nothing else, stands for."""
    return int(text) if re.fullmatch("[0-9]{1,4000}", text) else None


def request(
    query: str = "", headers: list[tuple[str, str]] | None = None, path: str = "/stream"
) -> web.Request:
    return make_mocked_request("GET", f"{path}?{query}", headers=CIMultiDict(headers or []))


def complaint(error: InvalidRequest) -> str:
    """One short line, whatever was sent."""
    message = str(error)
    assert (error.status, error.name) == (400, "InvalidRequest")
    assert message.isprintable()
    assert len(message.encode()) < 700
    return message


class TestCursor:
    @settings(max_examples=300)
    @given(texts)
    @example("")
    @example("-0")
    @example("007")
    @example("0" * 18 + "7")
    @example("0" * 5000)
    @example("9" * 5000)
    @example(str(SEQ_MAX))
    @example(str(SEQ_MAX + 1))
    @example("9" * 19)
    @example("1" + "0" * 18)
    @example(str(2**53 + 1))
    def test_any_text_is_exactly_its_number_or_refused_by_name(self, text: str) -> None:
        number = meant(text)
        try:
            cursor = parse_cursor(text, "cursor")
        except InvalidRequest as error:
            assert complaint(error).startswith("cursor: got ")
            # Written as a number is written, it would have been taken; more zeros may be refused.
            assert number is None or number > SEQ_MAX or str(number) != text
        else:
            assert cursor == number
            assert 0 <= cursor <= SEQ_MAX

    def test_leading_zeros_do_not_change_the_number(self) -> None:
        for text in ("00", "07", "010", "08", "0" * 18 + "9"):
            assert parse_cursor(text, "cursor") == int(text)

    @settings(max_examples=150)
    @given(st.binary(max_size=12) | st.text(st.sampled_from("0123456789")).map(str.encode))
    @example(b"+5")
    @example(b" 5")
    @example(b"5\x00")
    @example("５".encode())
    @example(b"\xff")
    def test_any_bytes_in_the_query_are_exactly_their_number_or_refused(self, raw: bytes) -> None:
        sent = request("cursor=" + quote(raw))
        try:
            cursor = stream_cursor(sent)
        except InvalidRequest as error:
            assert complaint(error).startswith("cursor: ")
            assert not raw.isdigit() or int(raw) > SEQ_MAX or raw.startswith(b"0")
        else:
            assert raw.isdigit()
            assert cursor == int(raw)

    @settings(max_examples=100)
    @given(sent_texts, st.none() | st.integers(0, SEQ_MAX))
    def test_any_text_in_the_header_wins_or_is_refused(self, text: str, query: int | None) -> None:
        sent = request("" if query is None else f"cursor={query}", [(LAST_EVENT_ID, text)])
        try:
            cursor = stream_cursor(sent)
        except InvalidRequest as error:
            assert complaint(error).startswith("Last-Event-ID: ")
            number = meant(text)
            assert number is None or number > SEQ_MAX or str(number) != text
        else:
            assert cursor == meant(text)

    @settings(max_examples=100)
    @given(
        st.lists(st.sampled_from(["0", "5", "7", "x", "", "-1"]), max_size=2),
        st.lists(st.sampled_from(["0", "5", "9", "y", "", "1.0"]), max_size=2),
    )
    def test_header_and_query_are_both_looked_at_and_the_header_wins(
        self, header: list[str], query: list[str]
    ) -> None:
        sent = request(
            urlencode([("cursor", text) for text in query]),
            [(LAST_EVENT_ID, text) for text in header],
        )
        bad = [
            name
            for name, given in ((LAST_EVENT_ID, header), ("cursor", query))
            if len(given) > 1 or any(not text.isdigit() for text in given)
        ]
        if bad:
            with pytest.raises(InvalidRequest) as caught:
                stream_cursor(sent)
            assert complaint(caught.value).startswith(tuple(f"{name}: " for name in bad))
        else:
            wanted = header or query
            assert stream_cursor(sent) == (int(wanted[0]) if wanted else None)


class TestWholeNumber:
    @settings(max_examples=150)
    @given(sent_texts | st.integers(-5, 300).map(str))
    @example("0")
    @example("1")
    @example("250")
    @example("251")
    @example("٣")
    @example("9" * 5000)
    def test_any_text_is_a_number_within_its_bounds_or_refused(self, text: str) -> None:
        sent = request(urlencode([("limit", text)]))
        number = meant(text)
        try:
            limit = whole_number(sent, "limit", 50, 1, 250)
        except InvalidRequest as error:
            assert complaint(error).startswith("limit: got ")
            assert number is None or not 1 <= number <= 250 or str(number) != text
        else:
            assert limit == number
            assert 1 <= limit <= 250

    def test_given_twice_it_is_refused_and_left_out_it_is_the_default(self) -> None:
        assert whole_number(request(), "limit", 50, 1, 250) == 50
        with pytest.raises(InvalidRequest, match="limit: given 2 times"):
            whole_number(request("limit=1&limit=1"), "limit", 50, 1, 250)


# Filters, as any list of pairs in a query.

NAMES = ("sources", "uriPatterns", "values")
DIDS = ("did:plc:alice", "did:plc:Alice", "did:web:bob.example")
URIS = ("at://did:plc:alice", "at://did:plc:alice/a/1", "at://did:plc:alice/a/%41", "https:x?a=b&c")
VALUES = ("spam", "Spam", "!hide", "ünïcode +&=;#%", "\U0001f600")

good_pairs = st.one_of(
    st.tuples(st.just("sources"), st.sampled_from(DIDS)),
    st.tuples(st.just("uriPatterns"), st.sampled_from(URIS)),
    st.tuples(
        st.just("uriPatterns"),
        st.builds(lambda uri, cut: uri[:cut] + "*", st.sampled_from(URIS), st.integers(1, 30)),
    ),
    st.tuples(st.just("values"), st.sampled_from(VALUES)),
    st.tuples(st.just("cursor"), st.text("0123456789")),
)
any_pairs = st.tuples(
    st.sampled_from([*NAMES, "source", "Sources", ""]),
    st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(["*", "**", "a*b", "\0"]),
)


def passes(pairs: list[tuple[str, str]], src: str, uri: str, val: str) -> bool:
    """The lexicon's words, once more and as plainly as possible."""
    given: dict[str, list[str]] = {name: [] for name in NAMES}
    for name, text in pairs:
        if name in given:
            given[name].append(text)
    by_pattern = [
        uri[: len(pattern) - 1] == pattern[:-1] if pattern[-1:] == "*" else uri == pattern
        for pattern in given["uriPatterns"]
    ]
    return (
        (not given["sources"] or src in given["sources"])
        and (not given["values"] or val in given["values"])
        and (not by_pattern or any(by_pattern))
    )


def near(text: str) -> list[str]:
    """A text and its nearest misses."""
    stem = text.removesuffix("*")
    return [stem, stem[:-1], stem + "x", "x" + stem, stem.swapcase()]


def assert_agrees(pairs: list[tuple[str, str]], made: Any) -> None:
    def probes(parameter: str, some: tuple[str, ...]) -> list[str]:
        return [*some, *(one for name, text in pairs if name == parameter for one in near(text))]

    sources, uris, values = map(probes, NAMES, (DIDS[:1], URIS[:1], VALUES[:1]))
    for src in sources:
        for uri in uris:
            for val in values:
                shown = made is None or made.matches(src, uri, val)
                assert shown == passes(pairs, src, uri, val), (src, uri, val)


class TestFilter:
    @settings(max_examples=100)
    @given(st.lists(good_pairs, max_size=6))
    def test_good_pairs_are_a_filter_that_agrees_on_any_label(
        self, pairs: list[tuple[str, str]]
    ) -> None:
        assert_agrees(pairs, request_filter(request(urlencode(pairs))))

    @settings(max_examples=150)
    @given(st.lists(any_pairs | good_pairs, max_size=4))
    def test_any_pairs_are_refused_by_name_or_a_filter_that_agrees_on_any_label(
        self, pairs: list[tuple[str, str]]
    ) -> None:
        try:
            made = request_filter(request(urlencode(pairs)))
        except InvalidRequest as error:
            message = complaint(error)
            assert message.startswith(tuple(f"{name}: got " for name, _ in pairs if name in NAMES))
        else:
            assert_agrees(pairs, made)

    @settings(max_examples=50)
    @given(st.sampled_from(NAMES), st.binary(max_size=12))
    @example("uriPatterns", b"at:\xed\xa0\x80*")
    @example("uriPatterns", b"at:\xff*")
    def test_any_bytes_are_a_filter_or_refused(self, name: str, raw: bytes) -> None:
        try:
            request_filter(request(f"{name}={quote(raw)}"))
        except InvalidRequest as error:
            assert complaint(error).startswith(f"{name}: got ")


class TestExpired:
    NOW = 1_780_315_200.0

    @pytest.mark.parametrize(
        ("query", "since"),
        [
            ("", None),
            ("expired=live", inf),
            ("expired=2026-06-01T12:00:00Z", NOW),
            ("expired=2026-06-01T14:00:00%2B02:00", NOW),
            ("expired=2026-06-01T12:00:09.999Z", NOW + 9.999),
            ("expired=1970-01-01T00:00:00Z", 0.0),
            ("expired=0001-01-01T00:00:00%2B23:59", -62_135_596_800 - 86_340.0),
        ],
    )
    def test_it_is_a_time_that_has_come_or_live(self, query: str, since: float | None) -> None:
        assert expired_since(request(query), self.NOW) == since

    @pytest.mark.parametrize("text", ["2026-06-01T12:00:11Z", "9999-12-31T00:00:00Z"])
    def test_a_time_to_come_is_refused(self, text: str) -> None:
        expected = f"expired: got '{text}', expected a time in the past"
        with pytest.raises(InvalidRequest, match=expected):
            expired_since(request(f"expired={text}"), self.NOW)

    def test_given_twice_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="expired: given 2 times, expected once"):
            expired_since(request("expired=live&expired=live"), self.NOW)

    @given(st.text(st.characters(exclude_categories=())) | texts)
    def test_anything_else_is_refused_by_name(self, text: str) -> None:
        with pytest.raises(InvalidRequest) as refused:
            expired_since(request(urlencode({"expired": text}, errors="replace")), self.NOW)
        assert complaint(refused.value).startswith("expired: got ")


NEAR_MISSES = {
    "lastEventID": "lastEventId", "lasteventid": "lastEventId", "last-event-id": "lastEventId",
    "last_event_id": "lastEventId", "Cursor": "cursor", "curser": "cursor", "cursors": "cursor",
    "value": "values", "Values": "values", "values[]": "values", "val": "values",
    "source": "sources", "src": "sources", "sourcse": "sources",
    "uriPattern": "uriPatterns", "uripatterns": "uriPatterns", "uri": "uriPatterns",
    "snapshots": "snapshot", "expires": "expired", "epochs": "epoch",
    "accessToken": "access_token", "acces_token": "access_token",
}  # fmt: skip
HARMLESS = [
    "_", "t", "r", "v", "ts", "cb", "time", "rand", "nonce", "cachebust", "cache", "utm_source",
    "utm_campaign", "fbclid", "gclid", "debug", "limit", "withCredentials", "a" * 8000, "é", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_parameter_that_is_almost_a_known_one_is_refused_and_the_right_one_named(
    name: str,
) -> None:
    request = make_mocked_request("GET", str(URL("/stream").with_query({name: "1"})))
    with pytest.raises(InvalidRequest, match=f"expected '{NEAR_MISSES[name]}'"):
        check_parameters(request, STREAM_PARAMETERS)


@pytest.mark.parametrize("name", HARMLESS, ids=lambda name: name[:20])
def test_a_parameter_that_is_plainly_something_else_is_ignored(name: str) -> None:
    request = make_mocked_request("GET", str(URL("/stream").with_query({name: "0.123"})))
    check_parameters(request, STREAM_PARAMETERS)


def test_so_many_unknown_parameters_are_compared_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(parameters, "_meant", lambda name, known: compared.append(name))
    query = "&".join(["values=a", *(f"x{number:x}" for number in range(1500))])
    check_parameters(make_mocked_request("GET", f"/stream?{query}"), STREAM_PARAMETERS)
    assert compared == [f"x{number:x}" for number in range(COMPARED_MAX)]


def test_every_known_parameter_is_taken() -> None:
    for known in (STREAM_PARAMETERS, QUERY_PARAMETERS, STREAMS_PARAMETERS):
        for name in known:
            check_parameters(make_mocked_request("GET", f"/?{name}=1"), known)


@pytest.mark.parametrize(
    ("headers", "target", "expected"),
    [
        ({"Last-Event-ID": "9"}, "/?lastEventId=5&cursor=1", 9),
        ({}, "/?lastEventId=5&cursor=1", 5),
        ({}, "/?cursor=1", 1),
        ({}, "/", None),
    ],
)
def test_where_a_client_resumes_wins_over_the_cursor_of_its_url(
    headers: dict[str, str], target: str, expected: int | None
) -> None:
    assert stream_cursor(make_mocked_request("GET", target, headers=headers)) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", " ", "9" * 20])
def test_a_resume_position_that_is_no_seq_is_refused(text: str) -> None:
    for request in (
        make_mocked_request("GET", "/?cursor=1", headers={"Last-Event-ID": text}),
        make_mocked_request("GET", str(URL("/").with_query({"lastEventId": text, "cursor": "1"}))),
    ):
        with pytest.raises(InvalidRequest):
            stream_cursor(request)


@pytest.mark.parametrize(
    "raw", ["/?values=caf%E9", "/?values=%zz", "/?a=%", "/?a=%4", "/%ff", "/?a=\udce9"]
)
def test_a_percent_encoding_that_is_no_text_is_refused(raw: str) -> None:
    with pytest.raises(InvalidRequest, match="percent-encoding"):
        check_encoding(make_mocked_request("GET", raw))


@pytest.mark.parametrize("raw", ["/?values=caf%C3%A9", "/?values=caf\u00e9", "/?a=%25", "/"])
def test_a_percent_encoding_of_text_is_taken(raw: str) -> None:
    check_encoding(make_mocked_request("GET", raw))


@pytest.mark.parametrize(
    ("asked", "position"),
    [
        (b"GET /stream HTTP/1.1\r\nlast-event-id: 7\r\nX: y\r\n\r\n", 7),
        (b"GET /stream?cursor=3 HTTP/1.1\r\nLast-Event-ID:7\r\n\r\n", 7),
        (b"GET /stream?cursor=3&lastEventId=5 HTTP/1.1\r\n\r\n", 5),
        (b"GET /stream?cursor=3 HTTP/1.1\r\n\r\n", 3),
        (b"GET /stream HTTP/1.1\r\n\r\n", 41),
        (b"GET /stream?snapshot=active HTTP/1.1\r\n\r\n", 0),
        (b"GET /stream?snapshot=active&cursor=2 HTTP/1.1\r\n\r\n", 2),
        # What it says is no position: it is told none, and comes back with what it has.
        (b"GET /stream HTTP/1.1\r\nLast-Event-ID: x\r\n\r\n", None),
        (b"GET /stream HTTP/1.1\r\nLast-Event-ID: 1\r\nLast-Event-ID: 2\r\n\r\n", None),
        (b"GET /stream HTTP/1.1\r\nLast-Event-ID:\r\n\r\n", None),
        (b"\xff\xfe", 41),
        (b"", 41),
    ],
)
def test_a_refused_client_is_told_its_own_position_and_else_the_head(
    asked: bytes, position: int | None
) -> None:
    assert position_asked(asked, 41) == position
