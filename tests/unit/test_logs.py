"""Log lines, as text and as JSON."""

from __future__ import annotations

import ast
import json
import logging
import sys
from pathlib import Path
from typing import Any

import sse_labels
from sse_labels.logs import EVERY_LINE, JsonFormatter, TextFormatter, _parsed


def record(message: str, *args: Any, error: bool = False) -> logging.LogRecord:
    found = sys.exc_info() if error else None
    made = logging.LogRecord("sse_labels.x", logging.INFO, "", 0, message, args, found)
    made.created, made.msecs = 1764000000.25, 250.0
    return made


def as_json(message: str, *args: Any, error: bool = False) -> dict[str, Any]:
    line = JsonFormatter("worker-2").format(record(message, *args, error=error))
    assert "\n" not in line
    return dict(json.loads(line))


def test_fields_of_the_sentence_are_keys_with_their_types() -> None:
    line = as_json(
        "stream closed: peer=%s seconds=%.1f position=%s cursor=%s", "::1", 1.26, 7, None
    )
    assert line == {
        "time": "2025-11-24T16:00:00.250Z", "level": "info", "logger": "sse_labels.x",
        "who": "worker-2", "message": "stream closed", "peer": "::1", "seconds": 1.3,
        "position": 7, "cursor": None,
    }  # fmt: skip


def test_same_sentence_is_one_line_of_text() -> None:
    text = TextFormatter("worker-2").format(record("opened: peer=%s", "::1"))
    assert text.endswith(",250 INFO worker-2 sse_labels.x: opened: peer=::1")


def test_line_without_named_fields_is_its_message() -> None:
    assert as_json("a file went bad: %s", "why")["message"] == "a file went bad: why"
    assert as_json("100 %")["message"] == "100 %"


def test_exception_is_a_field_and_no_line_of_its_own() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = as_json("it failed: position=%s", 3, error=True)
    assert line["exception"].endswith("ValueError: two\nlines")
    assert (line["message"], line["position"]) == ("it failed", 3)


def test_half_a_surrogate_pair_does_not_stop_a_line() -> None:
    assert as_json("x: peer=%s", "\udc80")["peer"] == "\\udc80"


def test_no_field_hides_what_every_line_has() -> None:
    for file in Path(sse_labels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = {name for name, _ in _parsed(node.value)[1]}
                assert not names & set(EVERY_LINE), f"{file}: {node.value}"
