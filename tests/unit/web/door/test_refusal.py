"""Clients that are refused at the door, over a pair of sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from sse_labels.errors import TooManyConnections
from sse_labels.web.door.refusal import READ_BYTES, Refusal, encode_refusal, refuse_at_once

FULL = TooManyConnections("full")
RETRY_MS, HEAD = 20_000, 99
BEGIN = b"GET /stream?cursor=1 HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n"
LATE = b"Last-Event-ID: 12\r\n\r\n"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's end and the client's."""
    server, client = socket.socketpair()
    yield server, client
    server.close()
    client.close()


def ids_in(answer: bytes) -> list[bytes]:
    return [line for line in answer.split(b"\n") if line.startswith(b"id:")]


@pytest.mark.parametrize("cut", [len(BEGIN), len(BEGIN + LATE) - 5, len(BEGIN + LATE) - 1])
async def test_a_head_that_comes_in_parts_is_read_to_its_end(
    pair: tuple[socket.socket, socket.socket], cut: int
) -> None:
    server, client = pair
    asked = BEGIN + LATE
    ended: list[Refusal] = []
    refusal = Refusal(server, FULL, RETRY_MS, HEAD, ended.append)
    client.sendall(asked[:cut])
    refusal._read()
    client.sendall(asked[cut:])
    refusal._read()
    refusal.end()
    assert ids_in(client.recv(READ_BYTES)) == [b"id: 12"]
    assert ended == [refusal]


async def test_half_a_head_is_answered_in_the_end_without_a_position(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Refusal] = loop.create_future()
    Refusal(server, FULL, RETRY_MS, HEAD, done.set_result)
    client.sendall(BEGIN)
    await done
    answer = client.recv(READ_BYTES)
    assert b'"TooManyConnections"' in answer
    assert ids_in(answer) == []


def test_half_a_head_that_is_refused_at_once_gets_no_position(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    client.sendall(BEGIN + LATE[:-6])
    refuse_at_once(server, FULL, RETRY_MS, HEAD)
    answer = client.recv(READ_BYTES)
    assert b'"TooManyConnections"' in answer
    assert ids_in(answer) == []


@pytest.mark.parametrize("accept", [b"text/event-stream", b"*/*"])
def test_head_is_refused_without_a_body(accept: bytes) -> None:
    asked = b"%b /stream HTTP/1.1\r\nAccept: " + accept + b"\r\n\r\n"
    whole = encode_refusal(asked % b"GET", FULL, RETRY_MS, HEAD)
    head, end, body = whole.partition(b"\r\n\r\n")
    assert body
    assert encode_refusal(asked % b"HEAD", FULL, RETRY_MS, HEAD) == head + end
