"""A mirror's parts that need no database: what waits to be stored, and how upstreams are named."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from sse_labels.cli.mirror import Wanted, mirror, upstream
from sse_labels.client.label_socket import LabelSocket
from sse_labels.client.retries import Lost
from sse_labels.errors import ConfigError
from sse_labels.mirror.following import Waiting
from sse_labels.mirror.storing import Aside
from sse_labels.mirror.upstream import Labels, Upstream, UpstreamConnection
from sse_labels.protocol.label import Label
from sse_labels.protocol.xrpc import SUBSCRIBE_PATH
from sse_labels.setting_parsers import Expected

from support.labeler import labels_message, wire_label

LABEL = Label("did:web:a.example", "at://x", "", "spam", None, "now", None, None)


def some(seq: int, labels: int = 1, nbytes: int = 100) -> Labels:
    return Labels(seq, [LABEL] * labels, [], nbytes)


async def test_a_batch_is_all_that_waits_up_to_its_labels() -> None:
    waiting = Waiting(10_000)
    for seq in range(1, 6):
        await waiting.put(some(seq, labels=2))
    assert [message.seq for message in await waiting.batch(5)] == [1, 2, 3]
    assert [message.seq for message in await waiting.batch(5)] == [4, 5]


async def test_a_batch_waits_for_the_first_message_alone() -> None:
    waiting = Waiting(10_000)
    batch = asyncio.create_task(waiting.batch(5))
    await asyncio.sleep(0)
    assert not batch.done()
    await waiting.put(some(1))
    assert [message.seq for message in await batch] == [1]


async def test_whoever_puts_waits_while_it_is_full_of_bytes() -> None:
    waiting = Waiting(250)
    for seq in (1, 2, 3):
        await asyncio.wait_for(waiting.put(some(seq)), 1)
    fourth = asyncio.create_task(waiting.put(some(4)))
    await asyncio.sleep(0)
    assert not fourth.done()
    assert waiting.qsize() == 300
    await waiting.batch(1)
    await asyncio.wait_for(fourth, 1)
    assert waiting.qsize() == 300


async def test_the_end_is_raised_behind_what_came_before_it() -> None:
    waiting = Waiting(10_000)
    await waiting.put(some(1))
    await waiting.put(some(2))
    await waiting.put(Lost("over"))
    assert [message.seq for message in await waiting.batch(50)] == [1, 2]
    with pytest.raises(Lost, match="over"):
        await waiting.batch(50)
    assert waiting.empty()


class Saying:
    """A WebSocket that brings messages."""

    def __init__(self, *payloads: bytes) -> None:
        self._left = list(payloads)

    async def receive(self) -> aiohttp.WSMessage:
        return aiohttp.WSMessage(aiohttp.WSMsgType.BINARY, self._left.pop(0), None)


async def read(*payloads: bytes) -> list[Any]:
    upstream = Upstream("ws://a.example", message_max_bytes=1 << 20)
    socket = LabelSocket(Saying(*payloads), {})  # type: ignore[arg-type]
    connection = UpstreamConnection(upstream, socket)
    return [await connection.next() for _ in payloads]


@pytest.mark.parametrize("labels", [0, 1, 50])
@pytest.mark.parametrize("val", ["spam", ""], ids=["stored", "set aside"])
async def test_what_waits_takes_no_more_memory_than_is_counted(labels: int, val: str) -> None:
    payloads = [
        labels_message(seq, *[wire_label(seq + each, val=val) for each in range(labels)])
        for seq in range(1, 2000 // (labels + 1))
    ]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        found = await read(*payloads)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held <= sum(message.nbytes for message in found)


async def test_a_label_that_is_nested_too_deeply_is_set_aside_without_itself() -> None:
    deep: Any = []
    for _ in range(5 * sys.getrecursionlimit()):
        deep = [deep]
    taken = Upstream("ws://a.example", message_max_bytes=1024).taken(1, 0, {"deep": deep})
    assert isinstance(taken, Aside)
    assert taken.label == b""
    assert taken.reason.endswith("it cannot be encoded")


@pytest.mark.parametrize(
    ("text", "url", "did"),
    [
        ("wss://labeler.example", f"wss://labeler.example{SUBSCRIBE_PATH}", None),
        ("https://labeler.example/", f"wss://labeler.example{SUBSCRIBE_PATH}", None),
        ("http://127.0.0.1:8080", f"ws://127.0.0.1:8080{SUBSCRIBE_PATH}", None),
        ("ws://[::1]:1/elsewhere", "ws://[::1]:1/elsewhere", None),
        ("https://LABELER.example:443", f"wss://labeler.example{SUBSCRIBE_PATH}", None),
        (
            "did:plc:abc=wss://labeler.example",
            f"wss://labeler.example{SUBSCRIBE_PATH}",
            "did:plc:abc",
        ),
        (
            "did:web:a.example%3A8080=wss://A.Example:8080/x?values=a%26b",
            "wss://a.example:8080/x?values=a%26b",
            "did:web:a.example%3A8080",
        ),
    ],
)
def test_an_upstream_is_named_by_its_address(text: str, url: str, did: str | None) -> None:
    assert upstream(text) == Wanted(url, did)


@pytest.mark.parametrize(
    "text",
    [
        "labeler.example", "ftp://labeler.example", "wss://", "wss://a:0", "wss://a b",
        "did:plc:abc", "did:plc:abc=", "did:=wss://a", "wss://a#b", "wss://a..b",
        "wss://u:p@a", "wss://[", "", "wss://a?cursor=5", "wss://a?epoch=", "wss://a?access_token=x",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Expected):
        upstream(text)


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        CliRunner().invoke(mirror, arguments, catch_exceptions=False)
    return str(raised.value)


def test_an_upstream_without_a_source_is_refused_with_the_ways_to_give_one() -> None:
    said = refused("did:web:b.example=wss://b.example", "wss://a.example")
    assert f"wss://a.example{SUBSCRIBE_PATH}" in said
    for way in ("DID=wss://", "--source-keys-file", "--any-source"):
        assert way in said


def test_a_password_in_an_address_is_never_shown() -> None:
    assert "secret" not in refused("wss://me:secret@a.example")
    assert "secret" not in refused("wss://a.example?access_token=secret")


def test_an_upstream_that_is_named_twice_is_refused() -> None:
    said = refused("wss://a.example", "https://a.example/")
    assert said == f"URL: got 'wss://a.example{SUBSCRIBE_PATH}', expected each upstream once"
