"""Reads labels from lines of JSON and puts them into batches.

Promises: a batch keeps the file's order and both limits. Each label has the number of its line. A
line that is not JSON is reported by its number. Lines are not reformatted. Only the server checks
whether a label is valid.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from sse_labels.errors import SseLabelsError

_PREFIX, _SEPARATOR, _SUFFIX = b'{"labels":[', b",", b"]}"


class NotPublished(SseLabelsError):
    """Some lines were not stored; the message names them."""


class Batch(NamedTuple):
    """The labels of one request."""

    #: The number of each label's line, from 1.
    numbers: list[int]
    labels: list[bytes]
    #: Bytes of the input that were read when the batch was complete.
    position: int

    @property
    def where(self) -> str:
        """Return the lines as a phrase: `line 3`, `lines 3 to 7`."""
        first, last = self.numbers[0], self.numbers[-1]
        return f"line {first}" if first == last else f"lines {first} to {last}"

    def body(self) -> bytes:
        """Return the request's body."""
        return _PREFIX + _SEPARATOR.join(self.labels) + _SUFFIX


def read_batches(file: BinaryIO, *, max_labels: int, max_bytes: int, first: int) -> Iterator[Batch]:
    """Yield batches of at most `max_labels` whose bodies have at most `max_bytes`.

    Begins with line `first`; empty lines are skipped. Raises NotPublished for the first line that
    is not JSON or too long. Labels before it that are not in a yielded batch are not yielded.
    """
    # A longer line cannot be sent. A limit is needed, because a file may have no line ends.
    room = max_bytes - len(_PREFIX) - len(_SUFFIX)
    numbers: list[int] = []
    labels: list[bytes] = []
    position = number = filled = 0
    while raw := _read_line(file, number + 1, room + len(codecs.BOM_UTF8) + 2):
        number += 1
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        line = line.strip()
        if line and number >= first:
            if len(line) > room:
                raise _not_sent(number, f"got more than {room} bytes, expected one label")
            _check(number, line)
            if len(labels) == max_labels or filled + len(line) > room:
                yield Batch(numbers, labels, position)
                numbers, labels, filled = [], [], 0
            numbers.append(number)
            labels.append(line)
            filled += len(line) + len(_SEPARATOR)
        position += len(raw)
        if len(labels) == max_labels:
            # Do not wait for the next line: it may come much later.
            yield Batch(numbers, labels, position)
            numbers, labels, filled = [], [], 0
    if labels:
        yield Batch(numbers, labels, position)


def _read_line(file: BinaryIO, number: int, size: int) -> bytes:
    try:
        return file.readline(size)
    except OSError as error:
        raise _not_sent(number, f"cannot be read: {error.strerror}") from None


def _check(number: int, line: bytes) -> None:
    # The parser of the standard library, because it names the column. The server decides.
    try:
        json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_sent(number, f"not UTF-8: {error.reason}, byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise _not_sent(number, f"not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _not_sent(number, f"not JSON: {error}") from None


def _not_sent(number: int, why: str) -> NotPublished:
    return NotPublished(f"line {number}: {why}; nothing of its batch is stored")
