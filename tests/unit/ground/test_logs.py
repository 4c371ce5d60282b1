"""Log lines, as text and as JSON."""

from __future__ import annotations

import ast
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sse_labels
from sse_labels.logs import (
    ADDRESSES_MAX,
    EXCEPTION_MAX_CHARS,
    FIELD_MAX_CHARS,
    MARKS,
    MESSAGE_MAX_CHARS,
    MINUTE_SECONDS,
    NO_FIELDS,
    JsonFormatter,
    LinesByAddress,
    TextFormatter,
    text_of,
)

log = logging.getLogger("sse_labels.x")


def record(message: str, *args: Any, error: bool = False, **fields: Any) -> logging.LogRecord:
    found = sys.exc_info() if error else None
    made = log.makeRecord(log.name, logging.INFO, "", 0, message, args, found, extra=fields)
    made.created, made.msecs = 1764000000.25, 250.0
    return made


def as_json(message: str, *args: Any, error: bool = False, **fields: Any) -> dict[str, Any]:
    line = JsonFormatter("worker-2").format(record(message, *args, error=error, **fields))
    assert "\n" not in line
    return dict(json.loads(line))


FIELDS = {"peer": "::1", "seconds": 1.2604, "position": 7, "cursor": None, "last": True}


def test_fields_are_keys_with_their_types() -> None:
    assert as_json("stream closed", **FIELDS, caused_by="::/64", opens="x", closes="y") == {
        "time": "2025-11-24T16:00:00.250Z", "level": "info", "logger": "sse_labels.x",
        "who": "worker-2", "message": "stream closed", "peer": "::1", "seconds": 1.26,
        "position": 7, "cursor": None, "last": True,
    }  # fmt: skip


def test_fields_follow_the_sentence_in_text() -> None:
    text = TextFormatter("worker-2").format(record("stream closed", **FIELDS, caused_by="::/64"))
    assert text.endswith(
        ",250 INFO worker-2 sse_labels.x: stream closed: "
        "peer=::1 seconds=1.26 position=7 cursor=None last=True"
    )


def test_line_without_fields_is_its_message() -> None:
    assert as_json("a library's line: %s", "why")["message"] == "a library's line: why"
    assert text_of(record("100 %")) == as_json("100 %")["message"] == "100 %"


def test_exception_is_a_field_and_no_line_of_its_own() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = as_json("it failed", position=3, error=True)
    assert line["exception"].endswith("ValueError: two\nlines")
    assert (line["message"], line["position"]) == ("it failed", 3)


def test_half_a_surrogate_pair_does_not_stop_a_line() -> None:
    assert as_json("x", peer="\udc80")["peer"] == "\\udc80"


FORGERY = "x\n2026-01-01 00:00:00,000 CRITICAL sse_labels.x: all is lost\r\x1b[2J\u2028\u202e\x00"
SENT = [FORGERY, "x" * 100_000, "\n" * 100_000, "\U000e0001" * 1000, "\udc80" * 1000]


@pytest.mark.parametrize("kind", [str, ValueError, ascii], ids=["a text", "an error", "escaped"])
@pytest.mark.parametrize("sent", SENT)
def test_what_strangers_sent_is_cut_and_begins_no_line(
    sent: str, kind: Callable[[str], object]
) -> None:
    fields = {"path": kind(sent), "seq": 7}
    text = TextFormatter().format(record("it failed", **fields))
    field = text.partition("path=")[2].removesuffix(" seq=7")
    assert text.endswith(" seq=7")
    assert text.isprintable()
    assert 0 < len(field) <= FIELD_MAX_CHARS
    line = as_json("it failed", **fields)
    assert (line["path"], line["seq"]) == (field, 7)


def test_short_field_is_written_as_it_is_and_a_long_one_says_how_long_it_was() -> None:
    for text in ("did:plc:é 😀 \\n", "x" * FIELD_MAX_CHARS):
        assert as_json("x", peer=text)["peer"] == text
    cut = as_json("x", peer="x" * (FIELD_MAX_CHARS + 1))["peer"]
    assert cut.endswith(f"xx… ({FIELD_MAX_CHARS + 1} characters)")
    assert len(cut) == FIELD_MAX_CHARS


@pytest.mark.parametrize("sent", SENT)
def test_lines_of_libraries_are_cut_as_well(sent: str) -> None:
    for template, args in ((sent.replace("%", ""), ()), ("%s and %s", (sent, sent))):
        text = TextFormatter().format(record(template, *args))
        message = text.partition("sse_labels.x: ")[2]
        assert text.isprintable()
        assert 0 < len(message) <= MESSAGE_MAX_CHARS
        assert as_json(template, *args)["message"] == message


@pytest.mark.parametrize("sent", SENT)
def test_exception_is_cut_at_its_beginning_and_begins_no_line(sent: str) -> None:
    try:
        raise ValueError(sent, "the end")
    except ValueError as error:
        error.add_note(sent[-1000:])
        text = TextFormatter().format(record("it failed", error=True))
        line = as_json("it failed", error=True)
    first, *others = text.splitlines()
    assert first.endswith("it failed")
    assert all(other.startswith("  ") for other in others)
    assert len(line["exception"]) <= EXCEPTION_MAX_CHARS + 9 * 1000


class TestLinesByAddress:
    @pytest.fixture
    def now(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def lines(self, now: list[float]) -> LinesByAddress:
        lines = LinesByAddress(lambda: now[0])
        lines.most = 10
        return lines

    @staticmethod
    def written(lines: LinesByAddress, **extra: str) -> bool:
        return lines.filter(record("x", **extra))

    def test_one_address_causes_so_many_in_a_minute_and_others_as_many(
        self, lines: LinesByAddress, now: list[float]
    ) -> None:
        for address in ("a", "b"):
            assert [self.written(lines, caused_by=address) for _ in range(12)] == (
                [True] * 10 + [False] * 2
            )
        # What nobody caused is always written.
        assert all(self.written(lines) for _ in range(50))
        assert lines.count["log_lines_left_out"] == 4
        now[0] += MINUTE_SECONDS
        assert self.written(lines, caused_by="a")

    def test_both_lines_of_a_pair_are_written_or_neither(
        self, lines: LinesByAddress, now: list[float]
    ) -> None:
        ids = [str(number) for number in range(8)]
        opened = [self.written(lines, caused_by="a", opens=each) for each in ids]
        assert opened == [True] * 5 + [False] * 3
        assert not self.written(lines, caused_by="a")
        now[0] += MINUTE_SECONDS
        assert [self.written(lines, closes=each) for each in ids] == opened
        assert lines._hidden == set()
        assert lines.count["log_lines_left_out"] == 7

    def test_a_line_says_how_many_were_left_out(
        self, lines: LinesByAddress, now: list[float], caplog: pytest.LogCaptureFixture
    ) -> None:
        for address in ("a", "b"):
            for _ in range(13):
                self.written(lines, caused_by=address)
        for _ in range(3):
            now[0] += MINUTE_SECONDS
            self.written(lines)
        expected = "lines were left out, some addresses cause too many: lines=6 addresses=2"
        [line] = caplog.text.splitlines()
        assert line.endswith(expected)

    def test_addresses_beyond_the_table_cause_no_more_than_one(self, lines: LinesByAddress) -> None:
        for number in range(ADDRESSES_MAX - 1):
            assert self.written(lines, caused_by=f"a{number}")
        written = [self.written(lines, caused_by=f"b{number}") for number in range(100)]
        # One has the last place, the others share one.
        assert sum(written) == 1 + 10
        assert len(lines._lines) <= ADDRESSES_MAX + 1
        # Whoever has its place keeps it.
        assert self.written(lines, caused_by="a0")

    def test_without_a_limit_all_are_written(self, lines: LinesByAddress) -> None:
        lines.most = None
        assert all(self.written(lines, caused_by="a") for _ in range(100))


#: Functions that take fields as keyword arguments. Loggers take them as `extra`.
BY_NAME = {"caused_by", "_log", "_log_limited"}


def fields_in(call: ast.Call) -> set[str]:
    if getattr(call.func, "id", getattr(call.func, "attr", "")) in BY_NAME:
        return {keyword.arg for keyword in call.keywords if keyword.arg}
    return {
        key.value
        for keyword in call.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict)
        for key in keyword.value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def test_no_field_hides_what_every_line_has() -> None:
    # `logging` raises KeyError for its own, when the line is written.
    taken = (NO_FIELDS - {*MARKS}) | as_json("x", error=True).keys()
    found = set()
    for file in Path(sse_labels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                found |= fields_in(node)
                assert not fields_in(node) & taken, f"{file}:{node.lineno}"
    assert {"peer", "next_try_seconds", "upstream", "kind", "reason"} <= found
