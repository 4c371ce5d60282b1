"""A notice's three forms say the same, and are made once."""

from __future__ import annotations

import json

from sse_labels.protocol import xrpc
from sse_labels.protocol.label import Row, label_json
from sse_labels.protocol.notice import Notice

from support.eventsource import parse

EXP = "2026-06-01T12:00:00Z"
ROW = Row(7, "did:plc:a", "at://b/c", "", "ü\n\u2028", True, "t", EXP, memoryview(b"\xfb\xff\xfe"))


def test_the_event_has_the_label_and_its_seq_and_moves_no_cursor() -> None:
    parsed = parse(b"id: 5\n\n" + Notice(1.0, ROW).block)
    [event] = parsed.events
    assert (event.event, parsed.last_event_id) == ("info", "5")
    assert json.loads(event.data) == {
        "name": "LabelExpired",
        "message": "the label of seq 7 has expired",
        "seq": 7,
        "label": label_json(*ROW.columns),
    }


def test_in_http_s_coding_it_is_one_whole_chunk() -> None:
    notice = Notice(1.0, ROW)
    assert notice.wire == b"%x\r\n%b\r\n" % (len(notice.block), notice.block)
    assert notice.wire is notice.wire


def test_the_message_has_the_same_and_the_signature_as_bytes() -> None:
    notice = Notice(1.0, ROW)
    header = 4 if notice.message[1] == 126 else 2
    message = xrpc.decode(notice.message[header:])
    event = json.loads(parse(notice.block).events[0].data)
    event["label"]["sig"] = ROW[8]
    assert (message.type, message.body) == ("#info", event)
    assert notice.message is notice.message
