"""How a log line looks: as text for people, or as one JSON object for machines.

Promises: a line is a constant sentence, and its fields are the `extra` of the call: they follow
the sentence as text (`stream opened: peer=::1 cursor=7`), or are keys beside `message`. Whatever
strangers sent, a field has `FIELD_MAX_CHARS` characters at most, all printable, and nothing of it
begins a line: in JSON nothing takes more than one, in text further lines are indented. One address
causes so many lines in a minute, and the rest is counted.
Does not belong here: what is logged, and when.
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
#: Of one field: of a filter as many as tell what it is about.
FIELD_MAX_CHARS = 500
#: Of a message as a whole, and of an exception: those of others have no fields.
MESSAGE_MAX_CHARS, EXCEPTION_MAX_CHARS = 8_000, 20_000
#: Addresses whose lines are counted apart in one minute; those that come later count as one.
ADDRESSES_MAX = 4096
MINUTE_SECONDS = 60.0

#: What `LinesByAddress` asks of a line.
MARKS = ("caused_by", "opens", "closes")
#: What a record has that is no field: the attributes of each, those of some, and the marks.
NO_FIELDS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", *MARKS})


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
                "lines were left out, some addresses cause too many",
                extra={"lines": left_out, "addresses": addresses},
            )


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
    """Makes one line of text, and indented lines for an exception."""

    default_msec_format: str = "%s,%03d"

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self.who = who
        # Lines of one second share its text: to make it takes a third as long as a line.
        self._second = lru_cache(1)(
            lambda second: time.strftime(self.default_time_format, self.converter(second))
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return when a line was logged."""
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
        """Return the traceback, of a long one the end: that says what happened."""
        text = super().formatException(ei)
        if len(text) > EXCEPTION_MAX_CHARS:
            text = f"…{text[-EXCEPTION_MAX_CHARS:]}"
        # JSON cannot hold half a surrogate pair: it is written out.
        return text.encode("utf-8", "backslashreplace").decode()


class JsonFormatter(TextFormatter):
    """Makes one object of a line; its time is RFC 3339 in UTC."""

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
    """Return the message: the constant part of a line of ours, the whole of another's."""
    return one_line(record.getMessage(), MESSAGE_MAX_CHARS)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return what `extra` said, as JSON can hold it."""
    return {name: _value(value) for name, value in vars(record).items() if name not in NO_FIELDS}


def _value(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    return round(value, 3) if isinstance(value, float) else one_line(str(value))


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
