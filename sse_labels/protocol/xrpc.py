"""The bytes of `com.atproto.label.subscribeLabels`: XRPC messages in WebSocket frames.

Promises: messages follow the lexicon. Every `encode_…` function returns a whole WebSocket frame
as a server sends it (unmasked), so that frames may be joined in any number. `decode` returns the
message of one frame, or raises MalformedMessage.

Sources: https://atproto.com/specs/event-stream (header and body, each DAG-CBOR); lexicon
`com.atproto.label.subscribeLabels`; RFC 6455, section 5.2 (frames), 7.4.1 (close codes).
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import libipld

from sse_labels.errors import SseLabelsError
from sse_labels.protocol.formats import shown

#: The path of `subscribeLabels` on every labeler.
SUBSCRIBE_PATH = "/xrpc/com.atproto.label.subscribeLabels"
#: The close code of the reference implementation after an error message.
CLOSE_POLICY = 1008

#: The heartbeat: a ping without a payload. It dispatches no message.
HEARTBEAT = b"\x89\x00"


class MalformedMessage(SseLabelsError):
    """The bytes are not a message of an event stream."""


class Message(NamedTuple):
    """One message. `type` is for example `#labels` or `#info`; None for an error.

    `type` is '' for an unknown `op`: the specification lets clients ignore such a message.
    """

    type: str | None
    body: dict[str, Any]


def cbor_label(label: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON form of a label (`label_json`) with its signature as bytes."""
    sig = label.get("sig")
    if sig is None:
        return dict(label)
    text: str = sig["$bytes"]
    return {**label, "sig": a2b_base64(text + "=" * (-len(text) % 4))}


def json_label(label: Any) -> Any:
    """Return a label of a message in its JSON form. Other values are returned unchanged."""
    if isinstance(label, dict) and isinstance(label.get("sig"), bytes):
        text = b2a_base64(label["sig"], newline=False).decode("ascii").rstrip("=")
        return {**label, "sig": {"$bytes": text}}
    return label


def encode_labels(seq: int, label: Mapping[str, Any]) -> bytes:
    """Return the frame of one event. `label` is its JSON form."""
    body = libipld.encode_dag_cbor({"seq": seq, "labels": [cbor_label(label)]})
    return frame(_LABELS + body)


def encode_info(name: str, message: str, **more: object) -> bytes:
    """Return the frame of an `#info` message. The stream continues after it."""
    return frame(_INFO + libipld.encode_dag_cbor({"name": name, "message": message, **more}))


def encode_error(name: str, message: str) -> bytes:
    """Return the frame of an error, the last message of a stream. A close frame must follow."""
    return frame(_ERROR + libipld.encode_dag_cbor({"error": name, "message": message}))


def frame(payload: bytes) -> bytes:
    """Return one whole binary frame."""
    size = len(payload)
    if size < 126:
        return b"\x82%c%b" % (size, payload)
    if size < 1 << 16:
        return b"\x82\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x82\x7f%b%b" % (size.to_bytes(8, "big"), payload)


def decode(payload: bytes) -> Message:
    """Return the message in the payload of one binary frame; raise MalformedMessage."""
    try:
        header, body = libipld.decode_dag_cbor_multi(payload)
    except Exception as error:  # libipld raises ValueError and its like, without a base of its own
        raise MalformedMessage(f"expected two objects in DAG-CBOR: {error}") from None
    if not isinstance(header, dict) or not isinstance(body, dict):
        raise MalformedMessage("expected a header and a body")
    match header:
        case {"op": 1, "t": str(type_)}:
            return Message(type_, body)
        case {"op": -1}:
            return Message(None, body)
        case {"op": op} if type(op) is int and op != 1:
            return Message("", body)
    got = f"op {shown(header.get('op'))} and t {shown(header.get('t'))}"
    raise MalformedMessage(f"expected a header with op 1 and t, or op -1, got {got}")


_LABELS = libipld.encode_dag_cbor({"op": 1, "t": "#labels"})
_INFO = libipld.encode_dag_cbor({"op": 1, "t": "#info"})
_ERROR = libipld.encode_dag_cbor({"op": -1})
