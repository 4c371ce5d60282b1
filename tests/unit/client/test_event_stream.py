"""Event streams, as the HTML standard interprets them: the same cases for each reader of ours."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.client.event_stream import (
    MESSAGE_MAX_BYTES,
    Block,
    EventStream,
    MessageTooLong,
    is_event_stream,
)

from support.event_streams import CASES, CONTENT_TYPES
from support.node import node_program
from support.program import REPOSITORY

SCRIPT = Path(__file__).parents[2] / "javascript/read.mjs"
PARSER = REPOSITORY / "sse_labels/web/page/reading/parser.js"


class Read(NamedTuple):
    """What a reader made of a body."""

    blocks: list[Block]
    retry: float | None


def by_python(bodies: list[list[bytes]]) -> list[Read]:
    """Read with what `tail` and `verify` read with."""
    found = []
    for pieces in bodies:
        stream = EventStream(pieces)
        blocks = list(stream)
        retry = None if stream.retry_seconds is None else 1000 * stream.retry_seconds
        found.append(Read(blocks, retry))
    return found


def by_page(bodies: list[list[bytes]]) -> list[Read]:
    """Read with what the page reads with."""
    return [
        Read([Block(**block) for block in read["blocks"]], read["retry"])
        for read in asked_of_page(bodies=bodies)["read"]
    ]


def asked_of_page(bodies: list[list[bytes]] | None = None, types: list[str] | None = None) -> Any:
    encoded = [[base64.b64encode(piece).decode() for piece in body] for body in bodies or ()]
    asked = {"parser": PARSER.as_uri(), "bodies": encoded, "types": types or []}
    done = subprocess.run(
        [node_program(), str(SCRIPT)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


READERS = [by_python, by_page]
Reading = Callable[[list[list[bytes]]], list[Read]]


def pieces_of(body: bytes) -> Iterator[list[bytes]]:
    """Yield the body whole, byte by byte, and cut once at each place."""
    yield [body]
    yield [body[at : at + 1] for at in range(len(body))]
    for at in range(1, min(len(body), 200)):
        yield [body[:at], body[at:]]


@pytest.mark.parametrize("read", READERS)
def test_stream_means_what_the_standard_says_however_it_is_cut(read: Reading) -> None:
    asked = [(case, pieces) for case in CASES for pieces in pieces_of(case.body)]
    results = read([pieces for _, pieces in asked])
    for (case, pieces), found in zip(asked, results, strict=True):
        where = f"{case.name} in {len(pieces)} pieces, the first {pieces[0][:60]!r}"
        assert dispatched(found) == case.dispatched, where
        assert found.retry == case.retry, where
        assert found.blocks[-1].id == case.last_id, where


def dispatched(found: Read) -> list[tuple[str, str, str]]:
    """What an `EventSource` would dispatch of the blocks."""
    return [(block.event, block.data, block.id) for block in found.blocks if block.data is not None]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
def test_block_is_read_when_its_empty_line_is_there(read: Reading, end: bytes) -> None:
    [found] = read([[b"data:a" + end + end]])
    assert dispatched(found) == [("message", "a", "")]


def test_content_type_of_an_event_stream_is_known() -> None:
    assert {kind: is_event_stream(kind) for kind in CONTENT_TYPES} == CONTENT_TYPES
    by_page = asked_of_page(types=list(CONTENT_TYPES))["types"]
    assert dict(zip(CONTENT_TYPES, by_page, strict=True)) == CONTENT_TYPES


@given(st.lists(st.sampled_from([*"\r\n:\0\ufeff …", "data", "id", "retry", "event", "7"])))
def test_cuts_change_nothing(parts: list[str]) -> None:
    body = "".join(parts).encode()
    whole, bytewise = by_python([[body], [body[at : at + 1] for at in range(len(body))]])
    assert whole == bytewise


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_message_without_an_end_is_not_read_into_memory(end: str) -> None:
    line = ("data: " + "x" * 1000 + end).encode()
    for piece in (line, line.removesuffix(end.encode())):
        taken = []
        with pytest.raises(MessageTooLong, match="more than 1048576 bytes"):
            list(EventStream(taken.append(each) or piece for each in range(5000)))
        assert len(taken) <= 1 + MESSAGE_MAX_BYTES // 1000
    # Many that end may be longer than that.
    assert len(list(EventStream([line + end.encode()] * 2000))) == 2000
