"""Log lines: formatted as text for people, or as one JSON object for machines.

Promises: a line is a constant sentence with fields, the `extra` of the call. As text, the fields
follow the sentence (`stream opened: peer=::1 cursor=7`). In JSON, they are keys besides `message`.
A field has at most `FIELD_MAX_CHARS` characters, and all are printable. So no sent value can begin
a new line. In JSON a message takes one line; in text, more lines of an exception are indented.
Each address may cause a limited number of lines per minute. Lines above the limit are counted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import ujson

log = logging.getLogger(__name__)

TEXT, JSON = "text", "json"
#: The most characters of one field: enough to see the purpose of a filter.
FIELD_MAX_CHARS = 500
#: The most characters of a message, and of an exception: other libraries' lines have no fields.
MESSAGE_MAX_CHARS, EXCEPTION_MAX_CHARS = 8_000, 20_000
#: The most addresses that are counted separately in one minute. All later ones count as one.
ADDRESSES_MAX = 4096
MINUTE_SECONDS = 60.0

#: The parts of `extra` that `LinesByAddress` reads.
MARKS = ("caused_by", "opens", "closes")
#: Attributes of a record that are not fields: those of all records, those of some, and the marks.
NO_FIELDS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", *MARKS})


class LinesByAddress(logging.Filter):
    """Passes the lines that one address may cause, and counts the rest.

    `caused_by` names the address of a line. The first line of a pair has a value `opens`, and the
    second has the same value as `closes`. Both lines of a pair are written, or neither.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        #: The most lines in a minute; None means no limit.
        self.most: int | None = None
        #: The counter of lines that are left out. The metrics replace it by their own.
        self.count: Counter[str] = Counter()
        self._clock = clock
        self._since = clock()
        self._lines: Counter[str] = Counter()
        self._left_out = 0
        #: The open pairs whose first line was left out.
        self._hidden: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        self._start_minute()
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

    def _start_minute(self) -> None:
        now = self._clock()
        if now - self._since < MINUTE_SECONDS:
            return
        left_out, addresses = self._left_out, len(self._lines)
        self._since, self._left_out = now, 0
        self._lines.clear()
        if left_out:
            log.warning(
                "lines were left out, some addresses cause too many",
                extra={"lines": left_out, "addresses": addresses},
            )


#: The filter of all log lines of this process.
by_address = LinesByAddress()


def configure_logging(
    level: str, form: str = TEXT, who: str = "", lines_per_address: int | None = None
) -> None:
    """Send log lines to standard error. `who` names one process of several.

    One address may cause `lines_per_address` lines in a minute. None means no limit.
    """
    handler = logging.StreamHandler()
    by_address.most = lines_per_address
    handler.addFilter(by_address)
    handler.setFormatter(JsonFormatter(who) if form == JSON else TextFormatter(who))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Our lines do not show these values, so they are not computed (Python's "Logging HOWTO",
    # Optimization). The log line took 18 % of the time to open a stream.
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, name, False)
    setattr(logging, "_srcfile", None)  # noqa: B010 - typeshed does not know it


class TextFormatter(logging.Formatter):
    """Formats a record as one line of text. An exception adds indented lines."""

    default_msec_format: str = "%s,%03d"

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self.who = who
        # Lines of one second share its text: making this text takes a third of a line's time.
        self._second = lru_cache(1)(
            lambda second: time.strftime(self.default_time_format, self.converter(second))
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time of a line."""
        return self.default_msec_format % (self._second(int(record.created)), record.msecs)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        who = f"{self.who} " if self.who else ""
        line = f"{self.formatTime(record)} {record.levelname} {who}{record.name}: {text_of(record)}"
        if record.exc_info:
            text = self.formatException(record.exc_info)
            line += "".join(f"\n  {each}" for each in text.splitlines())
        return line

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback. Of a long one, return the end, which names the error."""
        text = super().formatException(ei)
        if len(text) > EXCEPTION_MAX_CHARS:
            text = f"…{text[-EXCEPTION_MAX_CHARS:]}"
        # JSON cannot contain half a surrogate pair. Such a character is escaped.
        return text.encode("utf-8", "backslashreplace").decode()


class JsonFormatter(TextFormatter):
    """Formats a record as one JSON object. The time is RFC 3339 in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if self.who:
            line["who"] = self.who
        line |= {"message": sentence_of(record), **fields_of(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return ujson.dumps(line, escape_forward_slashes=False)


def text_of(record: logging.LogRecord) -> str:
    """Return the sentence and its fields as text."""
    fields = " ".join([f"{name}={value}" for name, value in fields_of(record).items()])
    return f"{sentence_of(record)}: {fields}" if fields else sentence_of(record)


def sentence_of(record: logging.LogRecord) -> str:
    """Return the message: the constant part of our lines, the whole line of other libraries."""
    return one_line(record.getMessage(), MESSAGE_MAX_CHARS)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of `extra`, as values that JSON can contain."""
    return {name: _value(value) for name, value in vars(record).items() if name not in NO_FIELDS}


def _value(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    return round(value, 3) if isinstance(value, float) else one_line(str(value))


def one_line(text: str, most: int = FIELD_MAX_CHARS) -> str:
    """Return text as one printable line of at most `most` characters.

    If the text is cut, the line ends with the number of its characters.
    """
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
