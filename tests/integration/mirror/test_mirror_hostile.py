"""A mirror of a hostile upstream: all that it causes is bounded, and the others get their turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from sse_labels.client import label_socket
from sse_labels.mirror import bounds, following
from sse_labels.mirror import upstream as upstreams

from support.clock import Clock
from support.database import TestDatabase, until
from support.labeler import (
    Labeler,
    error_message,
    info_message,
    labeler,
    labels_message,
    message,
    mirroring,
    wire_label,
)

PING = b"\x89\x00"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RETRY_FIRST_SECONDS", 0.01)


@pytest.fixture
async def upstream() -> AsyncIterator[Labeler]:
    async with labeler() as made:
        yield made


@pytest.fixture
async def honest() -> AsyncIterator[Labeler]:
    async with labeler() as made:
        yield made


def frame(opcode: int, payload: bytes = b"", *, fin: int = 0x80) -> bytes:
    """A frame as a server sends it, of less than 64 KiB."""
    if len(payload) < 126:
        return bytes([fin | opcode, len(payload)]) + payload
    return bytes([fin | opcode, 126]) + len(payload).to_bytes(2, "big") + payload


def raw(*pieces: bytes, endless: bool = False) -> Callable[..., Awaitable[bool]]:
    """Bytes after the handshake, the last of them again and again."""

    async def say(socket: web.WebSocketResponse, cursor: int) -> bool:
        writer = socket._writer  # the frames that aiohttp would never send
        assert writer is not None
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.transport.write(piece)
            while endless:
                writer.transport.write(pieces[-1])
                await writer.protocol._drain_helper()
                await asyncio.sleep(0)
            await socket.receive()
        return True

    return say


def lines(caplog: pytest.LogCaptureFixture, sentence: str) -> list[str]:
    return [line for line in caplog.text.splitlines() if sentence in line]


async def test_news_without_end_write_few_lines_and_end_the_connection(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    upstream.say = raw(frame(2, info_message("WeatherReport")) * 100, endless=True)
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.tally["reconnects"])
        assert mirror.tally["lines_left_out"] >= upstreams.CHATTER_MAX - following.LINES_MAX
    assert len(lines(caplog, "news:")) == following.LINES_MAX
    assert "without labels in a minute" in lines(caplog, "no upstream")[0]


@pytest.mark.parametrize(
    "piece",
    [PING, b"\x8a\x00", frame(2, message({"op": 7}, {}))],
    ids=["pings", "pongs", "unknown messages"],
)
async def test_what_says_nothing_ends_the_connection_when_there_is_too_much_of_it(
    upstream: Labeler,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    piece: bytes,
) -> None:
    monkeypatch.setattr(label_socket, "CLOSE_SECONDS", 0.1)
    upstream.say = raw(piece * 1000, endless=True)
    async with mirroring(database, upstream.url) as mirror:
        # It goes on while the connection is closed, which ends all the same.
        await until(lambda: mirror.tally["reconnects"] == 2)
    assert "without labels in a minute" in lines(caplog, "no upstream")[0]


async def test_large_messages_of_an_unknown_kind_end_the_connection(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    junk = message({"op": 1, "t": "#junk"}, {"junk": [{}] * 60_000})
    assert len(junk) < 1 << 16
    upstream.say = raw(frame(2, junk), endless=True)
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.tally["reconnects"])
    assert "KiB, without labels in a minute" in lines(caplog, "no upstream")[0]


async def test_of_labels_that_are_set_aside_the_newest_stay_and_all_are_counted(
    upstream: Labeler,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "ASIDE_MAX", 50)
    clock = Clock()
    async with mirroring(database, upstream.url, clock=clock) as mirror:
        for minute in range(1, 4):
            upstream.add(*[f"{minute}: no label"] * 40)
            await until(lambda minute=minute: mirror.cursor == minute)
            clock.set(60 * minute)
        # More in one minute than may be kept.
        upstream.add(*["4: no label"] * 500)
        await until(lambda: mirror.cursor == 4)
        upstream.add(*["never kept"] * 500)
        await until(lambda: mirror.cursor == 5)
        assert mirror.tally["set_aside"] == 1120
    kept = database.execute("SELECT seq, count(*) FROM label_set_aside GROUP BY seq ORDER BY seq")
    assert kept == [(4, 50)]
    assert database.execute("SELECT set_aside FROM label_upstream") == [(1120,)]
    assert len(lines(caplog, "a label is set aside")) == 4 * following.LINES_MAX


async def test_of_one_upstream_no_more_is_deleted_than_it_brings(
    upstream: Labeler,
    honest: Labeler,
    database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "ASIDE_MAX", 5)
    clock = Clock()
    honest.add("no label either")
    async with (
        mirroring(database, honest.url) as one,
        mirroring(database, upstream.url, clock=clock) as other,
    ):
        for seq in range(1, 5):
            upstream.add(*[f"{seq}: no label"] * 2)
            await until(lambda seq=seq: other.cursor == seq)
            clock.set(60 * seq)
        await until(lambda: one.cursor == 1)
    kept = "SELECT seq, place FROM label_set_aside WHERE url = %s ORDER BY id"
    assert database.execute(kept, (upstream.url,)) == [(2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    assert database.execute(kept, (honest.url,)) == [(1, 0)]


async def test_a_label_that_is_larger_than_any_is_set_aside_without_itself(
    upstream: Labeler, database: TestDatabase
) -> None:
    upstream.add(wire_label(1, val="x" * upstreams.ASIDE_MAX_BYTES))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
    [(reason, label)] = database.execute("SELECT reason, label FROM label_set_aside")
    assert reason.startswith("val: ")
    assert "bytes are not kept" in reason
    assert bytes(label) == b""


async def test_a_label_of_an_honest_upstream_is_stored_before_a_flood_beside_it_has_ended(
    upstream: Labeler,
    honest: Labeler,
    database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstreams, "CHATTER_MAX", 10**9)
    flooded = asyncio.Event()

    async def flood(socket: web.WebSocketResponse, cursor: int) -> bool:
        assert socket._writer is not None
        # As much as the kernel's buffers take at once, and as small as frames can be.
        socket._writer.transport.write(PING * 150_000)
        flooded.set()
        await socket.send_bytes(error_message("Over"))
        await socket.receive()
        return True

    upstream.say = flood
    async with mirroring(database, honest.url) as beside:
        honest.add(wire_label(1))
        await until(lambda: beside.cursor == 1)
        async with mirroring(database, upstream.url) as mirror:
            await flooded.wait()
            honest.add(wire_label(2))
            await until(lambda: beside.cursor == 2)
            assert mirror.tally["reconnects"] == 0
    assert len(database.stored()) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_refused(
    upstream: Labeler,
    honest: Labeler,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    # To an address of this network, and from one scheme to another.
    honest.add(wire_label(1))
    upstream.refusal = web.Response(
        status=status, headers={"Location": honest.url.replace("ws:", "http:") + "?cursor=0"}
    )
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.tally["reconnects"])
    assert honest.cursors == []
    assert f"it redirects ({status}) to http://127.0.0.1" in lines(caplog, "no upstream")[0]


@asynccontextmanager
async def server(*pieces: bytes) -> AsyncIterator[str]:
    """A TCP server that sends these bytes, the last of them again and again, at a trickle."""
    over = asyncio.Event()
    talking: list[asyncio.Task[None]] = []

    async def talk(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
        while not over.is_set() and not writer.is_closing():
            await asyncio.sleep(0.01)
            writer.write(pieces[-1])
        writer.close()

    listening = await asyncio.start_server(
        lambda _, writer: talking.append(asyncio.create_task(talk(writer))), "127.0.0.1"
    )
    port = listening.sockets[0].getsockname()[1]
    try:
        yield f"ws://127.0.0.1:{port}/xrpc/com.atproto.label.subscribeLabels"
    finally:
        over.set()
        listening.close()
        await asyncio.gather(*talking)


@pytest.mark.parametrize(
    "pieces",
    [(b"",), (b"HTTP/1.1 101 X\r\nX-A: ", b"a"), (b"HTTP/1.1 103 X\r\n\r\n",)],
    ids=["silence", "a trickle", "answers without end"],
)
async def test_a_handshake_that_never_ends_is_given_up(
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    pieces: tuple[bytes, ...],
) -> None:
    monkeypatch.setattr(label_socket, "CONNECT_SECONDS", 0.2)
    async with server(*pieces) as url, mirroring(database, url) as mirror:
        await until(lambda: mirror.tally["reconnects"] == 2)
    assert "no WebSocket was open within 0.2 s" in lines(caplog, "no upstream")[0]


@pytest.mark.parametrize(
    "pieces",
    [(b"\x82\x7e\xff\xff", b"x"), (frame(2, b"x", fin=0), frame(0, fin=0))],
    ids=["a frame that trickles", "fragments without end"],
)
async def test_a_message_that_never_ends_is_given_up(
    upstream: Labeler,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    pieces: tuple[bytes, ...],
) -> None:
    monkeypatch.setattr(label_socket, "FRAME_SECONDS", 0.2)

    async def trickle(socket: web.WebSocketResponse, cursor: int) -> bool:
        assert socket._writer is not None
        for piece in pieces:
            socket._writer.transport.write(piece)
        while not socket._writer.transport.is_closing():
            socket._writer.transport.write(pieces[-1])
            await asyncio.sleep(0.01)
        return True

    upstream.say = trickle
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.tally["reconnects"] == 2)
    assert "no whole frame came within 0.2 s" in lines(caplog, "no upstream")[0]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((frame(2, b"x" * 50_000, fin=0), frame(0, b"x" * 50_000, fin=0)), "exceeds limit"),
        ((frame(0x42, b"\x01\x00"),), "non-zero reserved bits"),
    ],
    ids=["fragments that grow", "compression that nobody asked for"],
)
async def test_what_would_grow_without_end_is_refused(
    upstream: Labeler,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    pieces: tuple[bytes, ...],
    said: str,
) -> None:
    upstream.say = raw(*pieces, endless=len(pieces) > 1)
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.tally["reconnects"])
    assert said in lines(caplog, "no upstream")[0]


def waits(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [float(line.rpartition("next_try_seconds=")[2]) for line in lines(caplog, "no upstream")]


@pytest.mark.parametrize("labels", [0, 1], ids=["nothing", "one label each time"])
async def test_an_upstream_that_closes_at_once_is_tried_less_and_less_often(
    upstream: Labeler,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    labels: int,
) -> None:
    monkeypatch.setattr(following, "RETRY_FIRST_SECONDS", 0.02)
    monkeypatch.setattr(following, "QUICK_TRIES", 2)

    async def close(socket: web.WebSocketResponse, cursor: int) -> bool:
        if labels:
            await socket.send_bytes(labels_message(cursor + 1, wire_label(cursor + 1)))
        return True

    upstream.say = close
    async with mirroring(database, upstream.url) as mirror:
        # A few waits are short because labels came; each one after them is twice as long.
        await until(lambda: mirror.tally["reconnects"] == 8)
    assert waits(caplog)[-1] >= 0.3
    assert mirror.cursor == 8 * labels


def test_a_quota_is_so_many_in_a_minute() -> None:
    clock = Clock()
    quota = bounds.Quota(10, clock)
    assert [quota.take(4), quota.take(4), quota.take(4), quota.take()] == [4, 4, 2, 0]
    clock.set(59)
    assert quota.take() == 0
    clock.set(60)
    assert quota.take(20) == 10


async def test_others_get_their_turn_after_a_while_and_as_long_after_a_long_one() -> None:
    clock = Clock()
    turn = bounds.Turn(clock)
    others: list[str] = []
    asyncio.get_running_loop().call_soon(others.append, "others")
    for _ in range(4):
        turn.begin()
        clock.now += bounds.TURN_SECONDS / 4.5
        await turn.end()
    assert others == []
    clock.now += bounds.TURN_SECONDS / 4.5
    await turn.end()
    assert others == ["others"]
    asyncio.get_running_loop().call_later(0.9 * bounds.LONG_TURN_SECONDS, others.append, "later")
    clock.now += 1.1 * bounds.LONG_TURN_SECONDS
    await turn.end()
    assert others == ["others", "later"]
