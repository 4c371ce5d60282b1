"""The bytes of an event stream, as the HTML standard defines them.

Promises: every `encode_…` function returns whole blocks: pure ASCII, with an empty line at the end.
No value in a block can start a new line. So blocks may be joined in any number, and no label can
forge a frame. Only this module makes HTTP's chunked coding.

Source: HTML standard, section 9.2 "Server-sent events",
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ujson

#: The comment that keeps a silent connection open: one line, which dispatches no event.
HEARTBEAT = b":\n\n"
_DATA = b"\ndata: "


def dumps(value: object) -> str:
    """Return compact JSON in ASCII.

    Some clients split lines as Python's `str.splitlines` does, for example at U+0085 and U+2028.
    Such characters are escaped, so that these clients read the whole frame too.
    """
    return ujson.dumps(value, escape_forward_slashes=False, ensure_ascii=True)


def encode_frame(seq: int, label: Mapping[str, Any]) -> str:
    """Return the frame of one event as text, so that all frames of a page are encoded at once.

    `label` is the JSON form that `label_json` makes. There is no `event:` line, so that
    `EventSource.onmessage` receives the event. The data is the JSON form of
    `com.atproto.label.subscribeLabels#labels`.
    """
    body = ujson.dumps(label, escape_forward_slashes=False, ensure_ascii=True)
    return f'id: {seq}\ndata: {{"seq":{seq},"labels":[{body}]}}\n\n'


def decode_frame(frame: bytes) -> tuple[int, dict[str, Any]]:
    """Return the seq and the label of a frame that `encode_frame` made."""
    data = ujson.loads(frame[frame.index(_DATA) + len(_DATA) :])
    return data["seq"], data["labels"][0]


def encode_id(seq: int) -> bytes:
    """Return a block with an id alone: it moves the client's last event id, without an event."""
    return b"id: %d\n\n" % seq


def encode_opening(retry_ms: int, seq: int, message: str, **more: object) -> bytes:
    """Return a stream's first bytes: the time before a reconnect, and the position.

    This is one block with data. From a block without data, six known clients make an empty message,
    and one of the six fails before it reads a label.
    """
    return b"retry: %d\n" % retry_ms + encode_info("StreamOpened", message, position=seq, **more)


def encode_info(name: str, message: str, *, position: int | None = None, **more: object) -> bytes:
    """Return an `info` event: a fact about the stream. It moves the client to `position`, if given.

    The stream continues after it.
    """
    data = dumps({"name": name, "message": message, **more})
    moved = "" if position is None else f"id: {position}\n"
    return f"{moved}event: info\ndata: {data}\n\n".encode("ascii")


def encode_error(name: str, message: str, *, cursor: int | None, retry_ms: int) -> bytes:
    """Return a stream's last bytes: why it ends, and the time before a reconnect.

    `cursor` is the client's position: the last seq that was written on this stream, or the
    position that a refused client sent. None when no position is known. The block has it as its id
    too: some clients take a missing id for an empty one, and would reconnect with an empty id.
    """
    fields: dict[str, object] = {"error": name, "message": message}
    position = ""
    if cursor is not None:
        fields["cursor"] = cursor
        position = f"id: {cursor}\n"
    return f"retry: {retry_ms}\n{position}event: error\ndata: {dumps(fields)}\n\n".encode("ascii")


def chunked(data: bytes | memoryview) -> bytes:
    """Return `data` as one chunk of HTTP/1.1's coding (RFC 9112, section 7.1).

    Empty data gives no bytes, because an empty chunk would end the body.
    """
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if data else b""


def unchunked(coded: bytes) -> memoryview:
    """Return the data of bytes that `chunked` made, without a copy."""
    return memoryview(coded)[coded.find(b"\n") + 1 : -2]
