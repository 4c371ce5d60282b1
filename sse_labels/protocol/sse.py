"""Bytes of an event stream, as the HTML standard reads them.

Promises: every function returns whole blocks (each ends with an empty line),
pure ASCII, in which no value can start a line of its own; so blocks may be
joined in any number, and no label can forge a frame. HTTP's chunked coding
of such blocks is made here and nowhere else.
Does not belong here: sockets, what is sent when.

Source: HTML standard, section 9.2 "Server-sent events",
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ujson

#: The comment that keeps a silent connection open: one line, dispatches nothing.
HEARTBEAT = b":\n\n"
_DATA = b"\ndata: "


def dumps(value: object) -> str:
    """Return compact JSON in ASCII.

    All of ASCII, so that a client which splits lines the way Python's
    `str.splitlines` does (at U+0085, U+2028, …) reads the frame whole.
    """
    return ujson.dumps(value, escape_forward_slashes=False, ensure_ascii=True)


def encode_frame(seq: int, label: Mapping[str, Any]) -> str:
    """Return the frame of one event, still as text, so that a page is encoded in one go.

    `label` is the wire form that `labels.label_json` makes. There is no `event:`
    line: `EventSource.onmessage` receives it. The data is the JSON form of
    `com.atproto.label.subscribeLabels#labels`.
    """
    body = ujson.dumps(label, escape_forward_slashes=False, ensure_ascii=True)
    return f'id: {seq}\ndata: {{"seq":{seq},"labels":[{body}]}}\n\n'


def decode_frame(frame: bytes) -> tuple[int, dict[str, Any]]:
    """Return the seq and the label of a frame that `encode_frame` made."""
    data = ujson.loads(frame[frame.index(_DATA) + len(_DATA) :])
    return data["seq"], data["labels"][0]


def encode_id(seq: int) -> bytes:
    """Return an id-only block: it moves the client's last event id and dispatches nothing."""
    return b"id: %d\n\n" % seq


def encode_opening(retry_ms: int, seq: int, message: str, **more: object) -> bytes:
    """Return a stream's first bytes: how long to wait before reconnecting, and from where.

    One block, and with data: of a block without, six clients hand out an empty message, and one
    of them throws on it before it reads a label.
    """
    return b"retry: %d\n" % retry_ms + encode_info("StreamOpened", message, position=seq, **more)


def encode_info(name: str, message: str, *, position: int | None = None, **more: object) -> bytes:
    """Return an `info` event: news about the stream, which goes on, from `position` if given."""
    data = dumps({"name": name, "message": message, **more})
    moved = "" if position is None else f"id: {position}\n"
    return f"{moved}event: info\ndata: {data}\n\n".encode("ascii")


def encode_error(name: str, message: str, *, cursor: int | None, retry_ms: int) -> bytes:
    """Return a stream's last bytes: why it ends, and when to come back.

    `cursor` is where the client stands: the last seq that was written on this stream, or its own
    position when it is refused. It is the block's id, too: a client that takes the id of each
    event for its position would take a missing one for the empty id, and come back with that.
    None when no position is known.
    """
    fields: dict[str, object] = {"error": name, "message": message}
    position = ""
    if cursor is not None:
        fields["cursor"] = cursor
        position = f"id: {cursor}\n"
    return f"retry: {retry_ms}\n{position}event: error\ndata: {dumps(fields)}\n\n".encode("ascii")


def chunked(data: bytes | memoryview) -> bytes:
    """Return `data` as one chunk of HTTP/1.1's coding (RFC 9112, section 7.1).

    Of no data nothing: a chunk of no bytes is the end of the body.
    """
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if data else b""


def unchunked(coded: bytes) -> memoryview:
    """Return the data of what `chunked` made, without a copy."""
    return memoryview(coded)[coded.find(b"\n") + 1 : -2]
