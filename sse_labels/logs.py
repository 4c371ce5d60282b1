"""How a log line looks: as text for people, or as one JSON object for machines.

Promises: a line's fields are given once, in its sentence: `"stream opened: peer=%s cursor=%s"`
is that text, or the message `stream opened` with the keys `peer` and `cursor`; in JSON nothing
takes more than one line, an exception least of all.
Stands beside the corridor: every room logs, and knows nothing of this.
Does not belong here: what is logged, and when.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import ujson

TEXT, JSON = "text", "json"

_PLACE = re.compile(r"(?:(\w+)=)?(%[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])")
#: What every line has; no field may be named so (test_no_field_hides_what_every_line_has).
EVERY_LINE = ("time", "level", "logger", "who", "message", "exception")


def configure_logging(level: str, form: str = TEXT, who: str = "") -> None:
    """Send log lines to standard error, one per event; `who` names one process of several."""
    handler = logging.StreamHandler()
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
        who = f"{who} " if who else ""
        super().__init__(f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s")

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
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if self._who:
            line["who"] = self._who
        line |= {"message": _printable(message), **fields}
        if record.exc_info:
            line["exception"] = _printable(self.formatException(record.exc_info))
        return ujson.dumps(line, escape_forward_slashes=False)


def sentence_and_fields(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """Return the constant part of a line and its fields; others' lines have none."""
    sentence, places = _parsed(str(record.msg))
    if not places or not isinstance(record.args, tuple) or len(places) != len(record.args):
        return record.getMessage(), {}
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


def _value(form: str, value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(form % value) if form[-1] in "feg" else value
    return _printable(str(value))


def _printable(text: str) -> str:
    """Return text that JSON can hold: half a surrogate pair is written out."""
    return text.encode("utf-8", "backslashreplace").decode()
