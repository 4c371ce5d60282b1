"""Messages of any part of a chunk are those of its events, and encoded once for all parts."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.feed.chunk import encode_rows
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row, label_json
from sse_labels.protocol.xrpc import encode_labels
from sse_labels.web import label_socket
from sse_labels.web.label_socket import Messages

PLENTY = 2**30
SPAM = Filter(values=frozenset({"spam"}))


def make_rows(count: int) -> list[Row]:
    return [
        Row(seq, "did:a:b", f"a:{seq}", "", "spam" if seq % 3 else "rude", None, "now", None, None)
        for seq in range(1, count + 1)
    ]


def expected(rows: list[Row]) -> bytes:
    return b"".join(encode_labels(row.seq, label_json(*row.columns)) for row in rows)


@given(st.integers(1, 12), st.sampled_from([0, 200, PLENTY]), st.data())
def test_messages_of_any_part_are_those_of_its_events(
    count: int, max_bytes: int, data: st.DataObject
) -> None:
    rows = make_rows(count)
    messages = Messages(max_bytes)
    parts = [encode_rows(rows, start=0, end=count, with_keys=True)]
    for _ in range(data.draw(st.integers(0, 8))):
        part = data.draw(st.sampled_from(parts))
        match data.draw(st.sampled_from(["after", "select", "read", "leave"])):
            case "after":
                most = data.draw(st.none() | st.integers(1, 5))
                parts.append(part.after(data.draw(st.integers(0, count)), most))
            case "select":
                parts.append(part.select(SPAM))
            case "leave" if len(parts) > 1:
                parts.remove(part)
        messages.events(part)
        del part
    for part in parts:
        assert messages.events(part) == expected([row for row in rows if row.seq in part.seqs])


@pytest.mark.parametrize("max_bytes", [1, PLENTY])
def test_an_event_is_encoded_once_for_all_who_read_the_same_chunk(max_bytes: int) -> None:
    chunk = encode_rows(make_rows(300), start=0, end=300, with_keys=True)
    messages = Messages(max_bytes)
    with mock.patch.object(label_socket, "encode_labels", wraps=encode_labels) as encode:
        for _ in range(100):
            messages.events(chunk)
        assert encode.call_count == 300


def test_an_event_is_encoded_once_for_all_filters_and_all_places() -> None:
    chunk = encode_rows(make_rows(300), start=0, end=300, with_keys=True)
    messages = Messages(PLENTY)
    with mock.patch.object(label_socket, "encode_labels", wraps=encode_labels) as encode:
        for number in range(50):
            filter = Filter(values=frozenset({"spam", str(number)}))
            messages.events(chunk.after(number))
            messages.events(chunk.select(filter))
            messages.events(chunk.after(number).select(filter).after(200))
        assert encode.call_count == 300


def test_a_part_is_encoded_by_itself_when_its_chunk_has_left() -> None:
    rows = make_rows(300)
    part = encode_rows(rows, start=0, end=300, with_keys=True).after(290)
    messages = Messages(PLENTY)
    with mock.patch.object(label_socket, "encode_labels", wraps=encode_labels) as encode:
        assert messages.events(part) == expected(rows[290:])
        assert encode.call_count == 10
