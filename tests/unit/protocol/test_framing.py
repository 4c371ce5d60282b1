"""From the body of a request to a browser's event: what is accepted comes out as it went in.

The way back knows nothing of the service: the standard library's HTTP client takes the chunked
coding off, `support.eventsource` reads the stream by the HTML standard, `json` the data.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from sse_labels.errors import InvalidLabel
from sse_labels.feed.chunk import Chunk, encode_rows
from sse_labels.protocol.label import LABEL_TYPE, Row, parse_label

from support.eventsource import parse

LEAST: dict[str, Any] = {
    "src": "did:plc:ewvi7nxzyoun6zhxrhs64oiz",
    "uri": "at://did:plc:7iza6de2dwap2sbkpav7c6c6/app.bsky.feed.post/3jzfcijpj2z2a",
    "val": "spam",
    "cts": "2024-05-01T12:00:00.000Z",
}
WHOLE: dict[str, Any] = {
    "$type": LABEL_TYPE,
    "ver": 1,
    **LEAST,
    "cid": "bafyreiabcdefghijkl",
    "neg": True,
    "exp": "2025-05-01T12:00:00+02:00",
    "sig": {"$bytes": "3q2+7w"},
}
#: Every field at its longest.
LONGEST: dict[str, Any] = {
    **WHOLE,
    "src": "did:plc:".ljust(2048, "x"),
    "uri": "https://".ljust(8192, '"'),
    "cid": "b" * 256,
    "val": "\U0001f600" * 32,
    "cts": f"2024-05-01T12:00:00.{'9' * 43}Z",
    "sig": {"$bytes": base64.b64encode(b"\xff" * 1024).decode()},
}
FORGED = (
    "\n\nid: 7\ndata: {}\n\n",
    "\r\rid: 7\rdata: {}\r\r",
    "\r\n0\r\n\r\n",
    '"}]}\n\ndata: {"seq":7,"labels":[{"val":"',
    "\\n\\nid: 7\\ndata: {}\\n\\n",
    "\x85\x85id: 7\x85",
    "\u2028\u2028data: x\u2029\u2029",
)
#: What some decoder, splitter, database or terminal takes for more than a character.
SPECIAL = [
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA1)),
    *"\u2028\u2029\ufeff\ufffe\uffff\ufffd\u200b\u202e\U0001f600\U0010ffff\ud800\udbff\udc00\udfff",
    *':"\\/{}[]* %',
    *FORGED,
]
#: Sent, PostgreSQL or UTF-8 would refuse them, or a line of a frame could end there.
NEVER = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029"} | {
    *map(chr, range(0xD800, 0xE000))
}

every_text = st.lists(
    st.sampled_from(SPECIAL) | st.characters(exclude_categories=()), min_size=1, max_size=8
).map("".join)
safe_text = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40
).filter(lambda text: len(text.encode()) <= 128)


@st.composite
def labels(draw: st.DrawFn) -> dict[str, Any]:
    """Labels as the lexicon allows them, the optional fields there or not."""
    days = st.integers(1, 28)
    zones = st.sampled_from(["Z", "+00:00", "-07:30", "+14:00"])

    def datetime() -> str:
        fraction = draw(st.sampled_from(["", ".0", ".123", ".000000000001"]))
        return f"2024-05-{draw(days):02}T12:00:00{fraction}{draw(zones)}"

    label = {
        "src": "did:" + draw(st.from_regex(r"\A[a-z]{1,8}:[a-zA-Z0-9._:-]{0,20}[a-zA-Z0-9]\Z")),
        "uri": draw(st.from_regex(r"\A(?!at:)[a-z]{1,5}:(//)?[!-.0-~][!-~]{0,40}\Z")),
        "val": draw(safe_text),
        "cts": datetime(),
    }
    optional: dict[str, Any] = {
        "$type": LABEL_TYPE,
        "ver": 1,
        "cid": draw(st.from_regex(r"\A[a-zA-P][a-zA-Z0-9+=]{7,40}\Z")),
        "neg": draw(st.booleans()),
        "exp": datetime(),
        "sig": {"$bytes": base64.b64encode(draw(st.binary(min_size=1, max_size=70))).decode()},
    }
    if draw(st.booleans()):
        optional["sig"]["$bytes"] = optional["sig"]["$bytes"].rstrip("=")
    present = draw(st.sets(st.sampled_from(sorted(optional))))
    return {**label, **{name: optional[name] for name in present}}


def stored(seq: int, given: object) -> Row:
    """The row that PostgreSQL would give back for an accepted label."""
    label = parse_label(given)
    for text in label:
        if isinstance(text, str):
            assert "\0" not in text, "PostgreSQL refuses it"
            assert text.encode().decode() == text
    return Row(seq, *label[:-1], None if label.sig is None else memoryview(label.sig))


def received(chunk: Chunk) -> list[tuple[str, dict[str, Any]]]:
    """Every event that a browser dispatches for these bytes: its last event id and its data."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection: Any = _Connection(head + chunk.wire + b"0\r\n\r\n")
    response = http.client.HTTPResponse(connection)
    response.begin()
    stream = response.read()
    # Nothing was left behind the end, and nothing came before its time.
    assert connection.read() == b""
    assert stream == chunk.data
    # Whoever splits lines as Python does sees the same: three for each event.
    assert len(stream.splitlines()) == len(stream.decode().splitlines()) == 3 * len(chunk)
    parser = parse(stream)
    assert not parser.inside_block
    assert parser.blocks == len(parser.events)
    assert {dispatched.event for dispatched in parser.events} <= {"message"}
    assert (parser.comments, parser.retry_ms) == ([], None)
    return [(dispatched.last_event_id, json.loads(dispatched.data)) for dispatched in parser.events]


def wire_form(given: dict[str, Any]) -> dict[str, Any]:
    """What the lexicon makes of an input: its defaults, and `$bytes` without padding."""
    label = {"ver": 1, **given}
    label.pop("$type", None)
    if label.get("neg") is False and "sig" not in label:
        # It says nothing, unless a signature covers it.
        del label["neg"]
    if "sig" in label:
        label["sig"] = {"$bytes": label["sig"]["$bytes"].rstrip("=")}
    return label


def assert_come_out(given: list[tuple[int, dict[str, Any]]]) -> None:
    """One event for each label, with its id, equal to what went in."""
    rows = [stored(seq, label) for seq, label in given]
    got = received(encode_rows(rows, start=0, end=2**63 - 1))
    assert got == [(str(seq), {"seq": seq, "labels": [wire_form(label)]}) for seq, label in given]


class TestAcceptedLabels:
    @settings(max_examples=60)
    @given(st.lists(labels(), min_size=1, max_size=4), st.integers(0, 2**63 - 100))
    @example([LEAST, WHOLE, LONGEST], 2**63 - 100)
    @example([LEAST], 2**53)
    def test_they_come_out_equal_to_what_went_in(
        self, given: list[dict[str, Any]], before: int
    ) -> None:
        # As a body carries them: escaped or not, it is the same label.
        for ensure_ascii in (True, False):
            body = json.loads(json.dumps(given, ensure_ascii=ensure_ascii))
            assert_come_out([(before + 3 * n, label) for n, label in enumerate(body, 1)])

    @settings(max_examples=150)
    @given(
        st.sampled_from([LEAST, WHOLE]),
        st.sampled_from(["src", "uri", "cid", "val", "cts", "exp", "sig"]),
        every_text,
        st.integers(0, 30),
    )
    @example(LEAST, "val", FORGED[3], 2)
    @example(LEAST, "val", FORGED[4], 0)
    @example(LEAST, "uri", FORGED[4], 30)
    def test_whatever_text_is_put_into_a_field_is_refused_or_comes_out(
        self, base: dict[str, Any], field: str, text: str, at: int
    ) -> None:
        old = WHOLE[field]["$bytes"] if field == "sig" else WHOLE[field]
        new = old[:at] + text + old[at:]
        given = {**base, field: {"$bytes": new} if field == "sig" else new}
        try:
            parse_label(given)
        except InvalidLabel as error:
            event("refused")
            assert error.field == field
            assert str(error).isprintable()
        else:
            event("accepted")
            assert not NEVER & set(new)
            assert_come_out([(6, LEAST), (7, given), (8, WHOLE)])

    @pytest.mark.parametrize("field", ["src", "uri", "cid", "val", "cts", "exp", "sig"])
    def test_each_special_character_is_refused_or_comes_out_wherever_it_stands(
        self, field: str
    ) -> None:
        old = WHOLE[field]["$bytes"] if field == "sig" else WHOLE[field]
        accepted: list[tuple[int, dict[str, Any]]] = []
        for special in SPECIAL:
            for new in (special + old, old + special, f"{old[:9]}{special}{old[9:]}", special):
                given = {**WHOLE, field: {"$bytes": new} if field == "sig" else new}
                try:
                    parse_label(given)
                except InvalidLabel as error:
                    assert error.field == field
                else:
                    assert not NEVER & set(new), ascii(new)
                    accepted.append((len(accepted) + 1, given))
        # In a value everything is allowed that a frame and a row can carry.
        assert len(accepted) >= (80 if field == "val" else 0)
        assert_come_out(accepted)

    def test_a_value_keeps_every_kind_of_character_but_those_that_are_refused(self) -> None:
        characters = [
            *range(0x2100),
            *range(0xD700, 0xE100),
            *range(0xFB00, 0x10100),
            *range(0x1F600, 0x1F650),
            *range(0xE0000, 0xE0080),
            *range(0x10FFF0, 0x110000),
        ]
        accepted: list[tuple[int, dict[str, Any]]] = []
        for code in characters:
            given = {**LEAST, "val": f"a{chr(code)}b"}
            if chr(code) in NEVER:
                with pytest.raises(InvalidLabel, match=f"U\\+{code:04X}"):
                    parse_label(given)
            else:
                accepted.append((code + 1, given))
        assert_come_out(accepted)


class TestSurrogates:
    """A pair is one character, and a lone one is no text: neither is ever half of the other."""

    @pytest.mark.parametrize("field", ["src", "uri", "cid", "val", "cts", "exp"])
    @pytest.mark.parametrize("lone", ["\ud83d", "\ude00", "\ude00\ud83d", "\ud83d\ud83d\ude00"])
    def test_lone_ones_are_refused_in_every_field(self, field: str, lone: str) -> None:
        with pytest.raises(InvalidLabel) as caught:
            parse_label({**WHOLE, field: WHOLE[field] + lone})
        assert caught.value.field == field
        assert "lone surrogate" in str(caught.value)

    def test_an_escaped_pair_is_the_character_itself(self) -> None:
        body = json.dumps({**LEAST, "val": "\U0001f600"})
        assert r"\ud83d\ude00" in body
        assert_come_out([(1, json.loads(body))])


class _Connection(io.BytesIO):
    """As much of a socket as `http.client` reads from; what it left unread can be looked at."""

    def makefile(self, _mode: str) -> io.BytesIO:
        return self

    def close(self) -> None:
        pass
