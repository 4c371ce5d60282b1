"""How a log line looks: as text for people, or as one JSON object for machines.

Promises: a line's fields are given once, in its sentence: `"stream opened: peer=%s cursor=%s"`
is that text, or the message `stream opened` with the keys `peer` and `cursor`. Whatever strangers
sent, a field has `FIELD_MAX_CHARS` characters at most, all printable, and nothing of it begins a
line: in JSON nothing takes more than one, in text further lines are indented. One address causes
so many lines in a minute, and the rest is counted.
Stands beside the corridor: every room logs, and knows nothing of this.
Does not belong here: what is logged, and when.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import ujson

log = logging.getLogger(__name__)

TEXT, JSON = "text", "json"
#: Of one field: of a filter as many as tell what it is about.
FIELD_MAX_CHARS = 500
#: Of a message as a whole, and of an exception: those of others have no fields.
MESSAGE_MAX_CHARS, EXCEPTION_MAX_CHARS = 8_000, 20_000
#: Addresses whose lines are counted apart in one minute; those that come later count as one.
ADDRESSES_MAX = 4096
MINUTE_SECONDS = 60.0

_PLACE = re.compile(r"(?:(\w+)=)?(%[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])")
#: What every line has; no field may be named so (test_no_field_hides_what_every_line_has).
EVERY_LINE = ("time", "level", "logger", "who", "message", "exception")


class LinesByAddress(logging.Filter):
    """Lets through what one address may cause, and counts the rest.

    A line says by `caused_by` whose it is. Of a pair, the first one has an `opens` and the second
    one the same as its `closes`: both are written or neither is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        #: In a minute; None: no limit.
        self.most: int | None = None
        #: Where lines that are left out are counted; the metrics' own once there are some.
        self.count: Counter[str] = Counter()
        self._clock = clock
        self._since = clock()
        self._lines: Counter[str] = Counter()
        self._left_out = 0
        #: Of the pairs that are open now, those whose first line was left out.
        self._hidden: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the line is written."""
        self._look_at_the_clock()
        closes, address = getattr(record, "closes", None), getattr(record, "caused_by", None)
        if closes is not None:
            shown = closes not in self._hidden
            self._hidden.discard(closes)
        elif self.most is None or address is None:
            shown = True
        else:
            opens = getattr(record, "opens", None)
            shown = self._take(address, 1 if opens is None else 2, self.most)
            if opens is not None and not shown:
                self._hidden.add(opens)
        if not shown:
            self._left_out += 1
            self.count["log_lines_left_out"] += 1
        return shown

    def _take(self, address: str, lines: int, most: int) -> bool:
        if address not in self._lines and len(self._lines) >= ADDRESSES_MAX:
            address = ""
        if self._lines[address] + lines > most:
            return False
        self._lines[address] += lines
        return True

    def _look_at_the_clock(self) -> None:
        now = self._clock()
        if now - self._since < MINUTE_SECONDS:
            return
        left_out, addresses = self._left_out, len(self._lines)
        self._since, self._left_out = now, 0
        self._lines.clear()
        if left_out:
            log.warning(
                "lines were left out, some addresses cause too many: lines=%s addresses=%s",
                left_out, addresses,
            )  # fmt: skip


#: What the lines of this process go through.
by_address = LinesByAddress()


def configure_logging(
    level: str, form: str = TEXT, who: str = "", lines_per_address: int | None = None
) -> None:
    """Send log lines to standard error, one per event; `who` names one process of several.

    `lines_per_address` is how many lines a minute one address may cause; None: no limit.
    """
    handler = logging.StreamHandler()
    by_address.most = lines_per_address
    handler.addFilter(by_address)
    handler.setFormatter(JsonFormatter(who) if form == JSON else TextFormatter(who))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # What no line of ours shows is not looked for (Python's "Logging HOWTO", Optimization): the
    # line in the log was 18 % of what it takes to open a stream.
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, name, False)
    setattr(logging, "_srcfile", None)  # noqa: B010 - typeshed does not know it


class TextFormatter(logging.Formatter):
    """Makes the text of a second once for all of its lines."""

    _second = 0
    _text = ""

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = f"{who} " if who else ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and indented lines for an exception."""
        line = f"{self.formatTime(record)} {record.levelname} {self._who}{record.name}: "
        line += message_of(record)
        if record.exc_info:
            line += "".join(f"\n  {each}" for each in exception_of(self, record).splitlines())
        return line

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return when a line was logged, as `logging` does by default."""
        second = int(record.created)
        if second != self._second:
            self._second, self._text = second, super().formatTime(record, "%Y-%m-%d %H:%M:%S")
        return f"{self._text},{int(record.msecs):03d}"


class JsonFormatter(logging.Formatter):
    """Makes one object of a line; its time is RFC 3339 in UTC."""

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        message, fields = sentence_and_fields(record)
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if self._who:
            line["who"] = self._who
        line |= {"message": message, **fields}
        if record.exc_info:
            line["exception"] = exception_of(self, record)
        return ujson.dumps(line, escape_forward_slashes=False)


def sentence_and_fields(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """Return the constant part of a line and its fields; others' lines have none."""
    sentence, places = _parsed(str(record.msg))
    if not places or not isinstance(record.args, tuple) or len(places) != len(record.args):
        return message_of(record), {}
    return sentence, {
        name: _value(form, value) for (name, form), value in zip(places, record.args, strict=True)
    }


@lru_cache(1024)
def _parsed(template: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the sentence and its fields as (name, placeholder); none when one has no name."""
    places = list(_PLACE.finditer(template))
    if not places or any(place[1] is None for place in places):
        return template, ()
    sentence = template[: places[0].start()].rstrip().removesuffix(":")
    return sentence, tuple((place[1], place[2]) for place in places)


def message_of(record: logging.LogRecord) -> str:
    """Return the message with its fields, on one line and of bounded length."""
    args = record.args
    if isinstance(args, tuple):
        message = str(record.msg) % tuple(map(_field, args)) if args else str(record.msg)
    else:
        message = record.getMessage()
    return one_line(message, MESSAGE_MAX_CHARS)


def one_line(text: str, most: int = FIELD_MAX_CHARS) -> str:
    """Return text as one printable line of at most `most` characters, and how many there were."""
    if len(text) <= most and text.isprintable():
        return text
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[:most]
    )
    if len(text) <= most and len(escaped) <= most:
        return escaped
    cut = f"… ({len(text)} characters)"
    return escaped[: most - len(cut)] + cut


class _Field:
    """A field that is cut when its placeholder writes it."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return one_line(str(self._value))

    def __repr__(self) -> str:
        return one_line(repr(self._value))


def _field(value: object) -> object:
    return value if value is None or isinstance(value, int | float) else _Field(value)


def _value(form: str, value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(form % value) if form[-1] in "feg" else value
    # JSON quotes a text itself.
    quoted = form[-1] == "r" and not isinstance(value, str)
    return one_line(repr(value) if quoted else str(value))


def exception_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """Return the traceback, of a long one the end: that says what happened."""
    assert record.exc_info  # noqa: S101 - whoever asks has looked
    text = formatter.formatException(record.exc_info)
    if len(text) > EXCEPTION_MAX_CHARS:
        text = f"…{text[-EXCEPTION_MAX_CHARS:]}"
    # JSON cannot hold half a surrogate pair: it is written out.
    return text.encode("utf-8", "backslashreplace").decode()
