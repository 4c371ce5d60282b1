"""Whole numbers from text: one way to read them, and nobody beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sse_labels
from sse_labels.protocol.seq import DIGITS_MAX, SEQ_MAX, number_in, seconds_in

FILES = sorted(Path(sse_labels.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("text", ["0", "7", "007", "0" * 18 + "7", str(SEQ_MAX)])
def test_ascii_digits_are_their_number_whatever_zeros_stand_in_front(text: str) -> None:
    assert number_in(text) == number_in(text.encode()) == int(text)


WRONG = ("", "-1", "+1", " 1", "1\n", "1_0", "1.0", "1e3", "0x1", "٣", "²", "\udc80")
LONG = (str(SEQ_MAX + 1), "0" * (DIGITS_MAX + 1), "000000001999999" * 2, "9" * 5000)


@pytest.mark.parametrize("text", [*WRONG, *LONG])
def test_anything_else_is_no_number(text: str) -> None:
    assert number_in(text) is None
    assert number_in(text.encode("utf-8", "surrogateescape")) is None


def test_number_beyond_a_bound_is_none() -> None:
    assert [number_in(str(n), 1, 3) for n in range(5)] == [None, 1, 2, 3, None]
    assert number_in("000000001999999", 1, 1000) is None


def test_wait_of_too_many_seconds_is_a_long_wait_and_no_error() -> None:
    assert [seconds_in(text) for text in ("0", "07", *LONG[:1], LONG[3])] == [
        0,
        7,
        SEQ_MAX,
        SEQ_MAX,
    ]
    assert [seconds_in(text) for text in WRONG] == [None] * len(WRONG)


def test_nobody_reads_digits_in_a_way_of_their_own() -> None:
    elsewhere = [
        f"{file.name}:{node.lineno}"
        for file in FILES
        if file.name != "seq.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("isdigit", "isdecimal", "isnumeric")
    ]
    assert elsewhere == []
