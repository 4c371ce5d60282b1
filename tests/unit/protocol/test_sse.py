"""The bytes of a stream: what a browser makes of them, and that no label can forge one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sse_labels.protocol.label import label_json
from sse_labels.protocol.sse import (
    HEARTBEAT,
    dumps,
    encode_error,
    encode_frame,
    encode_id,
    encode_info,
    encode_opening,
)

from support.eventsource import Dispatched, EventSourceParser, parse

SEQ_MAX = 2**63 - 1

#: What has ended a line, a field or a string somewhere, once.
NASTY = '\r\n\0\t\v\f\x1b\x1c\x1d\x1e\x85\u2028\u2029\ufeff\ufffe\ufffd\ud800\udfff:"\\/ {}[]\x7f'
#: Labels of another program are not checked by us: any text may stand in any column.
#: (Two surrogates that make a pair are one character in JSON, so they are joined here too.)
texts = st.text(st.one_of(st.sampled_from(NASTY), st.characters(exclude_categories=()))).map(
    lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
)
FORGED = (
    "\n\nid: 7\ndata: {}\n\n",
    "\r\rid: 7\rdata: {}\r\r",
    "\r\n\r\nevent: error\r\ndata: {}\r\n\r\n",
    "\x85\x85id: 7\x85",
    "\u2028\u2028data: x\u2029\u2029",
    "\0",
)
seqs = st.integers(0, SEQ_MAX)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Any, ...]:
    """A row's columns as the driver returns them: src, uri, cid, val, neg, cts, exp, sig."""
    sig = draw(st.none() | st.binary(max_size=80).map(memoryview))
    neg = draw(st.sampled_from([None, False, True]))
    exp = draw(st.none() | texts)
    return (draw(texts), draw(texts), draw(texts), draw(texts), neg, draw(texts), exp, sig)


def frame(seq: int, row: tuple[Any, ...]) -> bytes:
    return encode_frame(seq, label_json(*row)).encode("ascii")


#: Every function that makes bytes, as a function of one free text and a number.
BLOCKS: dict[str, tuple[int, Callable[[str, int], bytes]]] = {
    "frame": (
        1,
        lambda text, seq: frame(seq, (text, text, text, text, True, text, text, text.encode())),
    ),
    "id": (1, lambda _, seq: encode_id(seq)),
    "opening": (1, lambda text, seq: encode_opening(2500, seq, text, epoch=text)),
    "info": (1, lambda text, seq: encode_info(text, text, floor=seq)),
    "error": (1, lambda text, seq: encode_error(text, text, cursor=seq, retry_ms=2500)),
    "heartbeat": (1, lambda _text, _seq: HEARTBEAT),
}


class TestBlocks:
    @pytest.mark.parametrize("kind", BLOCKS)
    @pytest.mark.parametrize("text", ["", "plain", *(t for t in FORGED)])
    @pytest.mark.parametrize("seq", [0, 1, SEQ_MAX])
    def test_every_block_is_ascii_and_ends_with_its_only_empty_line(
        self, kind: str, text: str, seq: int
    ) -> None:
        blocks, encode = BLOCKS[kind]
        made = encode(text, seq)
        assert made.isascii()
        assert made.endswith(b"\n\n")
        assert made.count(b"\n\n") == blocks
        # Of all control characters only the line feeds that we wrote.
        assert all(byte >= 0x20 or byte == 0x0A for byte in made)

    @pytest.mark.parametrize("kind", BLOCKS)
    def test_a_block_leaves_nothing_behind_for_the_next_one(self, kind: str) -> None:
        blocks, encode = BLOCKS[kind]
        parser = parse(encode("text", 41))
        assert parser.blocks == blocks
        assert not parser.inside_block
        [event] = parser.feed(frame(42, ("s", "u", "", "v", None, "c", None, None)))
        assert (event.event, event.last_event_id) == ("message", "42")

    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.sampled_from(sorted(BLOCKS)), texts, seqs), max_size=6))
    def test_joined_blocks_are_read_as_each_alone(self, wanted: list[tuple[str, str, int]]) -> None:
        parts = [BLOCKS[kind][1](_encodable(text), seq) for kind, text, seq in wanted]
        whole = parse(b"".join(parts))
        assert whole.blocks == sum(BLOCKS[kind][0] for kind, _, _ in wanted)
        alone = [(event.event, event.data) for part in parts for event in parse(part).events]
        assert [(event.event, event.data) for event in whole.events] == alone


class TestFrames:
    @settings(max_examples=150)
    @given(seqs, columns())
    @example(SEQ_MAX, ("s", "u", "", "v", None, "c", None, None))
    @example(1, (FORGED[0],) * 4 + (True, FORGED[1], FORGED[2], None))
    @example(2, (FORGED[3], FORGED[4], FORGED[5], "\ud800", False, "", "", memoryview(b"\n\n")))
    def test_no_label_can_forge_a_line_or_a_frame(self, seq: int, row: tuple[Any, ...]) -> None:
        made = frame(seq, row)
        # Two lines and an empty one, for whoever splits them in whichever way.
        assert len(made.splitlines()) == 3
        assert len(made.decode().splitlines()) == 3
        lines = made.split(b"\n")
        assert lines[0] == b"id: %d" % seq
        assert lines[1].startswith(b"data: {")
        assert lines[2:] == [b"", b""]

        other = frame(5, ("s", "u", "", "v", None, "c", None, None))
        before, event, after = parse(other + made + other).events
        assert before == after == Dispatched("message", before.data, "5")
        assert (event.event, event.last_event_id) == ("message", str(seq))
        assert json.loads(event.data) == {"seq": seq, "labels": [label_json(*row)]}

    @settings(max_examples=30)
    @given(seqs, columns(), st.integers(1, 7))
    def test_where_the_network_cuts_the_bytes_makes_no_difference(
        self, seq: int, row: tuple[Any, ...], step: int
    ) -> None:
        made = encode_opening(3000, 1, "from 1") + frame(seq, row) + HEARTBEAT
        cut = EventSourceParser()
        for begin in range(0, len(made), step):
            cut.feed(made[begin : begin + step])
        whole = parse(made)
        assert (cut.events, cut.last_event_id, cut.retry_ms, cut.comments, cut.blocks) == (
            whole.events,
            whole.last_event_id,
            whole.retry_ms,
            whole.comments,
            whole.blocks,
        )

    def test_a_frame_is_the_lexicons_form_in_compact_json(self) -> None:
        row = ("did:plc:a", "at://b/c", "", "spam", True, "2026-01-01T00:00:00Z", None, b"\x01")
        assert frame(123, row) == (
            b'id: 123\ndata: {"seq":123,"labels":[{"ver":1,"src":"did:plc:a","uri":"at://b/c",'
            b'"val":"spam","neg":true,"cts":"2026-01-01T00:00:00Z","sig":{"$bytes":"AQ"}}]}\n\n'
        )

    def test_a_frame_has_no_event_line_so_that_onmessage_receives_it(self) -> None:
        [event] = parse(frame(1, ("s", "u", "", "v", None, "c", None, None))).events
        assert event.event == "message"

    @given(st.binary(min_size=1, max_size=100))
    def test_a_signature_comes_back_as_the_bytes_that_were_stored(self, sig: bytes) -> None:
        [event] = parse(frame(1, ("s", "u", "", "v", None, "c", None, memoryview(sig)))).events
        sent = json.loads(event.data)["labels"][0]["sig"]["$bytes"]
        assert base64.b64decode(sent + "=" * (-len(sent) % 4)) == sig


class TestPositions:
    def test_an_id_only_block_moves_the_last_event_id_and_dispatches_nothing(self) -> None:
        parser = parse(encode_id(77))
        assert parser.events == []
        assert parser.last_event_id == "77"

    def test_a_heartbeat_moves_nothing_and_dispatches_nothing(self) -> None:
        parser = parse(encode_id(77) + HEARTBEAT)
        assert parser.events == []
        assert parser.last_event_id == "77"
        assert parser.comments == [""]

    @pytest.mark.parametrize("seq", [0, 41, SEQ_MAX])
    def test_the_opening_tells_when_and_from_where_to_reconnect(self, seq: int) -> None:
        parser = parse(encode_opening(2345, seq, "text", head=seq))
        [event] = parser.events
        assert (event.event, event.last_event_id) == ("info", str(seq))
        assert json.loads(event.data) == {"name": "StreamOpened", "message": "text", "head": seq}
        assert parser.retry_ms == 2345
        assert (parser.blocks, parser.comments) == (1, [])

    def test_news_and_the_end_keep_the_last_event_id(self) -> None:
        parser = parse(encode_id(9) + encode_info("A", "b") + _error("C", "d", 9))
        assert [event.last_event_id for event in parser.events] == ["9", "9"]
        assert parser.last_event_id == "9"


class TestNewsAndTheEnd:
    @settings(max_examples=60)
    @given(texts, texts, seqs)
    def test_news_is_an_info_event_with_its_name_message_and_more(
        self, name: str, message: str, floor: int
    ) -> None:
        [event] = parse(encode_info(name, message, floor=floor)).events
        assert event.event == "info"
        assert json.loads(event.data) == {"name": name, "message": message, "floor": floor}

    @settings(max_examples=60)
    @given(texts, texts, seqs, st.integers(0, 10**7))
    def test_the_end_is_an_error_event_that_says_where_and_when_to_go_on(
        self, name: str, message: str, cursor: int, retry_ms: int
    ) -> None:
        parser = parse(encode_error(name, message, cursor=cursor, retry_ms=retry_ms))
        [event] = parser.events
        assert event.event == "error"
        assert json.loads(event.data) == {"error": name, "message": message, "cursor": cursor}
        assert (parser.retry_ms, event.last_event_id) == (retry_ms, str(cursor))

    def test_cursor_zero_is_told_and_no_cursor_is_left_out(self) -> None:
        [zero] = parse(_error("Name", "text", 0)).events
        [none] = parse(_error("Name", "text", None)).events
        assert json.loads(zero.data)["cursor"] == 0
        assert "cursor" not in json.loads(none.data)


class TestJson:
    def test_json_is_compact_ascii_with_plain_slashes(self) -> None:
        assert dumps({"a": ["at://x/y", "é\u2028😀"]}) == (
            '{"a":["at://x/y","\\u00e9\\u2028\\ud83d\\ude00"]}'
        )

    @given(texts)
    def test_any_text_survives_json(self, text: str) -> None:
        assert json.loads(dumps(text)) == text


class TestTheReaderItself:
    """The examples of the standard, so that the reader can be trusted with the rest."""

    def test_several_data_lines_are_one_event(self) -> None:
        parser = parse(b"data: YHOO\ndata: +2\ndata: 10\n\n")
        assert parser.events == [Dispatched("message", "YHOO\n+2\n10", "")]

    def test_ids_are_kept_until_an_empty_one_resets_them(self) -> None:
        parser = EventSourceParser()
        parser.feed(b": test stream\n\ndata: first event\nid: 1\n\n")
        assert parser.last_event_id == "1"
        parser.feed(b"data:second event\nid\n\ndata:  third event\n\n")
        assert [(event.data, event.last_event_id) for event in parser.events] == [
            ("first event", "1"),
            ("second event", ""),
            (" third event", ""),
        ]

    def test_an_empty_data_line_dispatches_and_an_unfinished_block_does_not(self) -> None:
        parser = parse(b"data\n\ndata\ndata\n\ndata:")
        assert [event.data for event in parser.events] == ["", "\n"]
        assert parser.inside_block

    def test_only_one_space_after_the_colon_is_taken_off(self) -> None:
        assert [event.data for event in parse(b"data:test\n\ndata: test\n\n").events] == [
            "test",
            "test",
        ]

    @pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
    @pytest.mark.parametrize("step", [1, 2, 3, 100])
    def test_three_line_endings_are_known_wherever_they_are_cut(
        self, end: bytes, step: int
    ) -> None:
        stream = end.join([b"event: x", b"data: a", b"data: b", b"", b"data: c", b"", b""])
        parser = EventSourceParser()
        for begin in range(0, len(stream), step):
            parser.feed(stream[begin : begin + step])
        assert [(event.event, event.data) for event in parser.events] == [
            ("x", "a\nb"),
            ("message", "c"),
        ]

    def test_no_other_character_ends_a_line(self) -> None:
        [event] = parse("data: a\x0b\x0c\x1c\x85\u2028\u2029b\n\n".encode()).events
        assert event.data == "a\x0b\x0c\x1c\x85\u2028\u2029b"

    def test_a_byte_order_mark_is_taken_off_once_and_bad_bytes_are_replaced(self) -> None:
        [event] = parse(b"\xef\xbb\xbfdata: \xef\xbb\xbfa\xff\n\n").events
        assert event.data == "\ufeffa\ufffd"

    def test_what_is_no_field_is_ignored(self) -> None:
        parser = parse(b"id: 3\0\nretry: 1x\nretry:\nDATA: a\ndata : b\nfoo: c\nretry: 10\n\n")
        assert parser.events == []
        assert parser.last_event_id == ""
        assert parser.retry_ms == 10

    def test_an_event_type_without_data_is_forgotten(self) -> None:
        [event] = parse(b"event: error\n\ndata: x\n\n").events
        assert event.event == "message"

    def test_an_id_counts_only_once_its_block_has_ended(self) -> None:
        parser = parse(b"id: 1\n\nid: 2\n")
        assert parser.last_event_id == "1"
        parser.feed(b"\n")
        assert parser.last_event_id == "2"


def _error(name: str, message: str, cursor: int | None) -> bytes:
    return encode_error(name, message, cursor=cursor, retry_ms=1000)


def _encodable(text: str) -> str:
    """Without lone surrogates: `BLOCKS` also makes a signature of the text."""
    return text.encode("utf-8", "replace").decode()
