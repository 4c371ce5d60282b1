"""Cases of the HTML standard for every reader of event streams in this project.

They follow the standard's own tests (web-platform-tests, `eventsource/format-*`), written anew,
with more of the same kinds. Source: HTML standard, 9.2.5 and 9.2.6.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A body, and the events that an `EventSource` dispatches for it."""

    name: str
    body: bytes
    #: The dispatched events: type, data, last event ID.
    dispatched: list[tuple[str, str, str]]
    #: The reconnection time in ms; None: the body gives none.
    retry: int | None = None
    #: The last event ID that a reconnect sends, also of a block that dispatches nothing.
    last_id: str = ""


def said(*data: str, kind: str = "message", last_id: str = "") -> list[tuple[str, str, str]]:
    """Return messages of one type."""
    return [(kind, each, last_id) for each in data]


LONG = b"x" * 4096

CASES = [
    # Byte order marks
    Case("bom", b"\xef\xbb\xbfdata:a\n\ndata:b\n\n", said("a", "b")),
    Case("bom-later", b"data:a\n\n\xef\xbb\xbfdata:b\n\ndata:c\n\n", said("a", "c")),
    Case("bom-twice", b"\xef\xbb\xbf\xef\xbb\xbfdata:a\n\ndata:b\n\n", said("b")),
    Case("bom-in-data", b"data:\xef\xbb\xbfa\n\n", said("\ufeffa")),
    # Comments
    Case(
        "comments",
        b"data:1\r:\0\n:\r\ndata:2\n:" + LONG + b"\rdata:3\n:data:no\r:" + LONG + b"\ndata:4\n\n",
        said("1\n2\n3\n4"),
    ),
    Case("comment-alone", b":\n\n:\n\ndata:a\n\n", said("a")),
    # The end
    Case("end-without-empty-line", b"data:a\n\nid:7\ndata:b\n", said("a")),
    Case("end-in-a-line", b"id:6\ndata:a\n\nid:7", said("a", last_id="6"), last_id="6"),
    Case("retry-counts-from-its-line-on", b"data:a\n\nretry:1000\n", said("a"), 1000),
    # data
    Case("data", b"data:\n\ndata\ndata\n\ndata:a\n\n", said("", "\n", "a")),
    Case("data-spaces", b"data:\ta\rdata: \ndata:  b\n\n", said("\ta\n\n b")),
    Case("null-character", b"data:\0\n\n\n\n", said("\0")),
    # Field names
    Case(
        "field-parsing",
        b"data:\0\ndata:  2\rData:1\ndata\0:2\ndata:1\r\0data:4\nda-ta:3\rdata_5\ndata:3\r"
        b"data:\r\n data:32\ndata:4\n\n",
        said("\0\n 2\n1\n3\n\n4"),
    ),
    Case(
        "field-unknown",
        b"data:a\n data\ndata\nfoo:x\njusttext\n:a comment\ndata:b\n\n",
        said("a\n\nb"),
    ),
    Case("field-case", b"DATA:a\nID:7\ndata:b\n\n", said("b")),
    # event
    Case("event", b"event:a\ndata:x\n\ndata:y\n\n", [*said("x", kind="a"), *said("y")]),
    Case("event-empty", b"event: \ndata:x\n\nevent\ndata:y\n\n", said("x", "y")),
    Case("event-without-data", b"event:a\n\ndata:x\n\n", said("x")),
    Case("event-last-wins", b"event:a\nevent:b\ndata:x\n\n", said("x", kind="b")),
    # id
    Case("id-holds", b"id:7\ndata:a\n\ndata:b\n\n", said("a", "b", last_id="7"), last_id="7"),
    Case(
        "id-alone-resets",
        b"id: 7\ndata:a\n\nid\ndata:b\n\nid: 8\ndata:c\n\nid:\n\n",
        [*said("a", last_id="7"), *said("b"), *said("c", last_id="8")],
    ),
    Case("id-without-data", b"id: 7\n\n", [], last_id="7"),
    Case(
        "id-that-is-no-number",
        "id: …x 1\ndata:a\n\n".encode(),
        said("a", last_id="…x 1"),
        last_id="…x 1",
    ),
    Case(
        "id-null",
        b"id:7\ndata:a\n\nid:\0x\ndata:b\n\nid:x\0\ndata:c\n\n",
        said("a", "b", "c", last_id="7"),
        last_id="7",
    ),
    Case("id-last-wins", b"id:7\nid:8\ndata:a\n\n", said("a", last_id="8"), last_id="8"),
    # retry
    Case("retry", b"retry:3000\ndata:a\n\n", said("a"), 3000),
    Case("retry-bogus", b"retry:3000\nretry:1000x\ndata:a\n\n", said("a"), 3000),
    Case("retry-empty", b"retry\nretry:\ndata:a\n\n", said("a")),
    Case(
        "retry-digits-only",
        "retry:-1\nretry:+1\nretry:1.5\nretry:1e3\nretry: 1 \nretry:1_0\nretry:٣\n\n".encode(),
        [],
    ),
    Case("retry-space", b"retry: 0200\n\n", [], 200),
    Case("retry-holds", b"retry:200\n\ndata:a\n\n", said("a"), 200),
    # Ends of lines
    Case("newlines", b"data:a\r\ndata\ndata:b\r\n\r", said("a\n\nb")),
    Case("lone-cr", b"data:a\rdata:b\r\rdata:c\r\r", said("a\nb", "c")),
    Case("crlf", b"data:a\r\ndata:b\r\n\r\ndata:c\r\n\r\n", said("a\nb", "c")),
    Case("cr-then-crlf", b"data:a\r\r\ndata:b\n\r\n", said("a", "b")),
    Case(
        "no-other-newlines",
        "data:a\u2028b\u0085c\x0bd\x0ce\x1cf\n\n".encode(),
        said("a\u2028b\u0085c\x0bd\x0ce\x1cf"),
    ),
    # UTF-8, always
    Case("utf-8", "data:ok…😀\n\n".encode(), said("ok…😀")),
    Case("utf-8-broken", b"data:a\xff\xc3b\n\n", said("a\ufffd\ufffdb")),
]

#: Content types, and whether the standard accepts them for an event stream.
CONTENT_TYPES = {
    "text/event-stream": True,
    "text/event-stream;": True,
    "text/event-stream; charset=utf-8": True,
    "text/event-stream;charset=windows-1251": True,
    "TEXT/Event-Stream": True,
    " text/event-stream ; x=y": True,
    "text/event-stream;bogus": True,
    "text/event-streamx": False,
    "xtext/event-stream": False,
    "text/event-stream-x": False,
    "text/event": False,
    "text/plain; text/event-stream": False,
    "x bogus": False,
    "": False,
}
