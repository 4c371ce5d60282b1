"""A reader of event streams, written only from the HTML standard.

It contains nothing about this service. It dispatches the same events as a browser. Its input may be
cut anywhere.

Source: HTML standard, sections 9.2.5 "Parsing an event stream" and 9.2.6
"Interpreting an event stream",
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dispatched:
    """One `MessageEvent`: its type, its data and its lastEventId."""

    event: str
    data: str
    last_event_id: str


@dataclass
class EventSourceParser:
    """Turns bytes into events; its state is that of an `EventSource` object."""

    #: All events dispatched so far.
    events: list[Dispatched] = field(default_factory=list)
    #: The `Last-Event-ID` of the next request; it changes only at the end of a block.
    last_event_id: str = ""
    #: The reconnection time in milliseconds; None until the server gives one.
    retry_ms: int | None = None
    #: The comments without their colon; they dispatch nothing.
    comments: list[str] = field(default_factory=list)
    #: The number of ended blocks, also of those that dispatched nothing.
    blocks: int = 0

    def __post_init__(self) -> None:
        # "UTF-8 decode" removes one byte order mark at the start and replaces invalid bytes.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._line = ""
        self._after_cr = False
        self._forget_block()
        self._id = ""

    @property
    def inside_block(self) -> bool:
        """Whether bytes came after the last empty line; at the end of the stream they are lost."""
        return self._fresh_lines > 0 or self._line != ""

    def feed(self, data: bytes) -> list[Dispatched]:
        """Take the next bytes; return the events that they completed."""
        before = len(self.events)
        for character in self._decoder.decode(data):
            # Only CR LF, LF and CR end a line.
            if character == "\n":
                if not self._after_cr:
                    self._end_line()
                self._after_cr = False
            elif character == "\r":
                self._end_line()
                self._after_cr = True
            else:
                self._line += character
                self._after_cr = False
        return self.events[before:]

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if line == "":
            self._dispatch()
            return
        self._fresh_lines += 1
        name, colon, value = line.partition(":")
        if colon and name == "":
            self.comments.append(value)
            return
        self._process(name, value.removeprefix(" "))

    def _process(self, name: str, value: str) -> None:
        # Field names are compared exactly; other names are ignored.
        if name == "event":
            self._event = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id":
            if "\0" not in value:
                self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)

    def _dispatch(self) -> None:
        self.blocks += 1
        self.last_event_id = self._id
        if self._data:
            data = self._data.removesuffix("\n")
            self.events.append(Dispatched(self._event or "message", data, self.last_event_id))
        self._forget_block()

    def _forget_block(self) -> None:
        # The buffer of the last event ID stays: it does not belong to the block.
        self._data = ""
        self._event = ""
        self._fresh_lines = 0


def parse(stream: bytes) -> EventSourceParser:
    """Return the state after a whole stream; an unfinished block at its end is ignored."""
    parser = EventSourceParser()
    parser.feed(stream)
    return parser
