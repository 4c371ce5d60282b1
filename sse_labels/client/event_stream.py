"""Parses an event stream as in the HTML standard (section 9.2.6).

Promises: the blocks do not depend on how the bytes are cut into pieces. The length of a message is
bounded. The page's parser (`web/page/reading/parser.js`) passes the same tests.
Does not belong here: connections, and the meaning of the blocks.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sse_labels.errors import SseLabelsError
from sse_labels.protocol.seq import seconds_in

#: The longest label is about 12 KB on the wire (8 KiB of URI, 2 KiB of DID, 128 bytes in escapes).
MESSAGE_MAX_BYTES = 1024**2


class MessageTooLong(SseLabelsError):
    """A message has too many bytes without an empty line at its end."""


class Block(NamedTuple):
    """The lines before an empty line."""

    #: The last event ID, also from an earlier block.
    id: str
    #: "message" when the block names no event.
    event: str
    #: None: the block has no data. An `EventSource` dispatches no event then.
    data: str | None


class EventStream:
    """Yields the blocks of a body.

    Unlike `EventSource` it also yields blocks without data: an id alone is a position, and a
    comment shows that the server is alive.
    """

    def __init__(self, pieces: Iterable[bytes] = ()) -> None:
        """Read `pieces`. A caller without an iterable uses `push`."""
        self._pieces = pieces
        #: The last `retry:`. It applies from its line on, even before its block ends.
        self.retry_seconds: float | None = None
        # Always UTF-8, even if the answer names another encoding. One byte order mark at the
        # begin is dropped.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        #: The last character was a CR. A LF after it belongs to the same line end.
        self._after_cr = False
        self._id = ""
        self._event = ""
        self._data: list[str] = []
        self._held = 0

    def __iter__(self) -> Iterator[Block]:
        """Yield each block as soon as it ends. Raises MessageTooLong."""
        for piece in self._pieces:
            yield from self.push(piece)

    def push(self, piece: bytes) -> Iterator[Block]:
        """Yield the blocks that end in this piece. Raises MessageTooLong."""
        text = self._decoder.decode(piece)
        if not text:
            return
        if self._after_cr:
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        lines[0] = self._rest + lines[0]
        self._rest = lines.pop()
        for line in lines:
            if line:
                self._field(line)
            else:
                yield self._block()
        if self._held + len(self._rest) > MESSAGE_MAX_BYTES:
            raise MessageTooLong(f"a message of more than {MESSAGE_MAX_BYTES} bytes")

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._held += len(line)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and (milliseconds := seconds_in(value)) is not None:
            self.retry_seconds = milliseconds / 1000

    def _block(self) -> Block:
        data = "\n".join(self._data) if self._data else None
        block = Block(self._id, self._event or "message", data)
        self._event = ""
        self._data.clear()
        self._held = 0
        return block


def is_event_stream(content_type: str) -> bool:
    """Return whether the type is that of an event stream, with any parameters and case."""
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"
