"""The guard, over real sockets, in front of a small aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import sse_labels
from sse_labels.errors import PayloadTooLarge
from sse_labels.metrics import Metrics
from sse_labels.web.addresses import PerAddress
from sse_labels.web.answers import errors_as_json
from sse_labels.web.door import connection, guard, refusal
from sse_labels.web.door.guard import Guard, most_connections
from sse_labels.web.neighbours import Neighbours
from sse_labels.web.publish import read_body

PATIENCE_SECONDS = 20.0
GET = b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nHost: test\r\n\r\n"


@dataclass
class Site:
    """A guarded application in this process."""

    guard: Guard
    metrics: Metrics
    port: int = 0
    listener: socket.socket | None = None
    #: What the streams wait for before they write once more and end.
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def connect(self, **options: Any) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, **options)
        return Client(reader, writer)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for what other parts of this event loop will make true; that has no event."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@dataclass
class Client:
    """One connection of a client."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, request: bytes = GET) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one response with a Content-Length, or the head of a stream."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(head[0].split(" ")[1]), headers, body

    async def refusal(self, request: bytes = b"") -> tuple[int, dict[str, str], dict[str, Any]]:
        """Read a response and then the end of the connection."""
        status, headers, body = await self.ask(request)
        assert headers["connection"] == "close"
        await self.until_closed()
        return status, headers, json.loads(body)

    async def until_text(self, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.reader.readuntil(text)

    async def until_closed(self) -> bytes:
        """Read to the end, which must be a proper one."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            rest = await self.reader.read()
        await self.close()
        return rest

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def application(site: Site, request_seconds: float) -> web.Application:
    async def hello(request: web.Request) -> web.Response:
        return web.json_response({"hello": "world"})

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=bytes(64 * 1024**2))

    async def store(request: web.Request) -> web.Response:
        return web.json_response({"bytes": len(await read_body(request, request_seconds))})

    async def refuse(request: web.Request) -> web.Response:
        raise PayloadTooLarge("whatever it is")

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"opened\n")
        await site.news.wait()
        await response.write(b"news\n")
        return response

    app = web.Application(
        middlewares=[errors_as_json(site.metrics, lambda request: request.remote or "")],
        client_max_size=1024**2,
    )
    app.router.add_get("/hello", hello)
    app.router.add_get("/large", large)
    app.router.add_get("/stream", stream)
    app.router.add_post("/store", store)
    app.router.add_post("/refuse", refuse)
    return app


@contextlib.asynccontextmanager
async def guarded(
    *,
    max_connections: int = 100,
    per_address: int = 10_000,
    request_seconds: float = PATIENCE_SECONDS,
    keepalive_seconds: float = PATIENCE_SECONDS,
    neighbours: Neighbours | None = None,
) -> AsyncIterator[Site]:
    metrics = Metrics()
    made = Guard(
        metrics,
        PerAddress(per_address, exempt=lambda address: False),
        max_connections=max_connections,
        request_seconds=request_seconds,
        keepalive_seconds=keepalive_seconds,
        busy_retry_ms=lambda: 34567,
        head=lambda: 41,
        neighbours=neighbours or Neighbours(),
        streams_full=lambda: False,
    )
    site = Site(made, metrics)
    runner = web.AppRunner(
        application(site, request_seconds), handler_cancellation=True, shutdown_timeout=1
    )
    await runner.setup()
    assert runner.server is not None
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        site.listener, site.port = listener, listener.getsockname()[1]
        try:
            async with made.serving(runner.server, [listener]):
                yield site
        finally:
            site.news.set()
            await runner.cleanup()
            await site.until(lambda: made.open == 0)


async def test_connection_over_the_limit_is_refused_in_http_and_the_others_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It ends with the answer, not with the time-out.
    monkeypatch.setattr(refusal, "REFUSAL_SECONDS", 2 * PATIENCE_SECONDS)
    async with guarded(max_connections=2) as site:
        old = [await site.connect(), await site.connect()]
        for client in old:
            await client.ask(STREAM)
            await client.until_text(b"opened\n")
        status, headers, body = await (await site.connect()).refusal(GET)
        assert (status, body["error"]) == (503, "TooManyConnections")
        assert "2 connections" in body["message"]
        assert int(headers["retry-after"]) >= 1
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert site.metrics.requests_refused["TooManyConnections"] == 1
        assert site.guard.open == 2
        site.news.set()
        for client in old:
            await client.until_text(b"news\n")
            await client.close()


async def test_place_of_a_connection_that_ended_is_free_again() -> None:
    async with guarded(max_connections=1) as site:
        for _ in range(3):
            client = await site.connect()
            assert (await client.ask())[0] == 200
            assert (await (await site.connect()).refusal(GET))[0] == 503
            await client.close()
            await site.until(lambda: site.guard.open == 0)


async def test_full_worker_lets_another_one_accept_each_time_it_does() -> None:
    taken: list[socket.socket] = []

    class Other(Neighbours):
        """A worker with room, which takes a connection when this one yields, or is stuck."""

        stuck = yielded_to = False

        def yields(self, *, full: bool) -> bool:
            if not full or self.yielded_to:
                return False
            self.yielded_to = True
            if not self.stuck:
                assert site.listener is not None
                with contextlib.suppress(BlockingIOError):
                    taken.append(site.listener.accept()[0])
            return True

        def accepted(self) -> None:
            self.yielded_to = False

    other = Other()
    async with guarded(max_connections=1, neighbours=other) as site:
        clients = [await site.connect()]
        assert (await clients[0].ask())[0] == 200
        await site.until(lambda: not other.yielded_to)
        for count in range(1, 4):
            clients.append(await site.connect())
            await site.until(lambda count=count: len(taken) == count and not other.yielded_to)
        # Nobody waits for one that takes none.
        other.stuck = True
        for _ in range(2):
            assert (await (await site.connect()).refusal(GET))[0] == 503
            assert other.yielded_to
        for each in (*clients, *taken):
            await each.close() if isinstance(each, Client) else each.close()


async def test_refused_event_source_is_told_to_come_back_later() -> None:
    async with guarded(max_connections=0) as site:
        client = await site.connect()
        request = b"GET /stream HTTP/1.1\r\nHost: test\r\nAccept: Text/Event-Stream\r\n\r\n"
        status, headers, body = await client.ask(request)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert headers["access-control-allow-origin"] == "*"
        assert b"retry: 34567\n" in body
        assert b"event: error\n" in body
        assert b"TooManyConnections" in body
        assert await client.until_closed() == b""


async def test_refused_websocket_handshake_is_broken_off() -> None:
    async with guarded(max_connections=0) as site:
        client = await site.connect()
        client.writer.write(
            b"GET /xrpc/com.atproto.label.subscribeLabels HTTP/1.1\r\nHost: test\r\n"
            b"Connection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert await client.until_closed() == b""
        assert site.metrics.requests_refused["TooManyConnections"] == 1


async def test_refused_client_that_asks_nothing_is_answered_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusal, "REFUSAL_SECONDS", 0.05)
    async with guarded(max_connections=0) as site:
        assert (await (await site.connect()).refusal())[0] == 503


async def test_refused_clients_hold_few_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_REFUSALS", 3)
    async with guarded(max_connections=0) as site:
        before = open_descriptors()
        clients = [await site.connect() for _ in range(50)]
        # The last one is answered at once: as many as may be linger already.
        status, _, body = await clients[-1].answer()
        assert (status, json.loads(body)["error"]) == (503, "TooManyConnections")
        assert open_descriptors() - before == 50 + 3
        for client in clients:
            await client.close()
        await site.until(lambda: open_descriptors() == before)


async def test_one_address_over_its_limit_is_refused_and_another_is_not() -> None:
    async with guarded(per_address=2) as site:
        greedy = [await site.connect() for _ in range(2)]
        for client in greedy:
            assert (await client.ask())[0] == 200
        status, headers, body = await (await site.connect()).refusal(GET)
        assert (status, body["error"]) == (429, "TooManyFromAddress")
        assert int(headers["retry-after"]) >= 1
        other = await site.connect(local_addr=("127.0.0.2", 0))
        assert (await other.ask())[0] == 200
        await greedy[0].close()
        await site.until(lambda: site.guard.open == 2)
        again = await site.connect()
        assert (await again.ask())[0] == 200
        for client in (greedy[1], other, again):
            await client.close()
        await site.until(lambda: len(site.guard.per_address) == 0)


async def test_head_sent_byte_by_byte_is_answered_408_in_time() -> None:
    async with guarded(request_seconds=0.3) as site:
        client = await site.connect()
        answer = asyncio.create_task(client.answer())
        async with asyncio.timeout(PATIENCE_SECONDS):
            client.writer.write(b"GET /")
            while not answer.done():
                client.writer.write(b"x")
                await asyncio.sleep(0.01)
        status, headers, body = answer.result()
        assert (status, json.loads(body)["error"]) == (408, "RequestTimeout")
        assert headers["connection"] == "close"
        await site.until(lambda: site.guard.open == 0)
        await client.close()


async def test_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async with guarded(request_seconds=0.1) as site:
        client = await site.connect()
        assert await client.until_closed() == b""


async def test_second_head_on_a_connection_is_bounded_from_its_first_byte() -> None:
    async with guarded(request_seconds=0.2) as site:
        client = await site.connect()
        assert (await client.ask())[0] == 200
        assert len(site.guard.terms.heads) == 0
        status, _, body = await client.refusal(b"GET /hello HT")
        assert (status, body["error"]) == (408, "RequestTimeout")


async def test_idle_connection_is_closed_after_its_keep_alive() -> None:
    async with guarded(keepalive_seconds=0.1) as site:
        client = await site.connect()
        assert (await client.ask())[0] == 200
        assert await client.until_closed() == b""


async def test_body_that_does_not_become_whole_is_answered_408(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "LINGERING_SECONDS", 0.1)
    # On a busy machine the client may take its answer late: no reset before then.
    async with guarded(request_seconds=0.2, keepalive_seconds=60) as site:
        client = await site.connect()
        head = b"POST /store HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n"
        status, headers, body = await client.ask(head + b"x")
        assert (status, json.loads(body)["error"]) == (408, "RequestTimeout")
        assert headers["connection"] == "close"
        assert await client.until_closed() == b""


async def test_one_connection_serves_many_requests() -> None:
    async with guarded(request_seconds=0.5, keepalive_seconds=0.5) as site:
        client = await site.connect()
        body = b"POST /store HTTP/1.1\r\nHost: test\r\nContent-Length: 900000\r\n\r\n" + bytes(
            900_000
        )
        for _ in range(50):
            assert (await client.ask())[0] == 200
            assert (await client.ask(body))[2] == b'{"bytes": 900000}'
            assert site.guard.open == 1
        await client.close()


async def test_open_stream_is_never_ended_by_the_guard() -> None:
    async with guarded(request_seconds=0.05, keepalive_seconds=0.05) as site:
        stream = await site.connect()
        await stream.ask(STREAM)
        await stream.until_text(b"opened\n")
        assert len(site.guard.terms.heads) == len(site.guard.terms.answers) == 0
        for _ in range(3):
            # Every time-out that the guard knows has passed when these are over.
            await (await site.connect()).until_closed()
            used = await site.connect()
            used.writer.write(GET)
            # On busy cores its time may be over before it is read: then it is reset.
            with contextlib.suppress(ConnectionResetError):
                await used.until_closed()
            await used.close()
        site.news.set()
        await stream.until_text(b"news\n")
        await stream.close()


async def test_client_that_does_not_take_its_answer_is_cut() -> None:
    async with guarded(request_seconds=0.1, keepalive_seconds=0.1) as site:
        client = await site.connect(limit=1024)
        client.writer.write(b"GET /large HTTP/1.1\r\nHost: test\r\n\r\n")
        await site.until(lambda: site.guard.open == 1)
        await site.until(lambda: site.guard.open == 0)
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
            await client.reader.read()
        await client.close()


async def test_answer_that_comes_before_the_body_is_whole_arrives_alone() -> None:
    async with guarded() as site:
        client = await site.connect()
        size = 5 * 1024**2
        head = b"POST /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % size
        client.writer.write(head)
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]) == (413, "PayloadTooLarge")
        client.writer.write(bytes(size))
        # Read to its end, the connection may be used again.
        assert (await client.ask())[0] == 200
        await client.close()


@pytest.mark.parametrize(
    ("request_", "status", "name"),
    [
        (b"GET /hello HTTP/1.1\r\nX: " + b"secret" * 2000 + b"\r\n\r\n", 431, "HeadTooLarge"),
        (b"GET /" + b"secret" * 2000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "HeadTooLarge"),
        (b"GET /hello HTTP/1.1\r\n" + b"X: secret\r\n" * 200 + b"\r\n", 400, "InvalidRequest"),
        (b"GET /hello HTTP/1.1\r\n" + (b"X: " + b"secret" * 900 + b"\r\n") * 20,
         431, "HeadTooLarge"),
        (b"\r\n\r\nGET /hello HTTP/1.1\r\n" + (b"X: " + b"secret" * 900 + b"\r\n") * 20,
         431, "HeadTooLarge"),
        (b"\r\n" * 40_000, 431, "HeadTooLarge"),
        (b"secret\r\n\r\n", 400, "InvalidRequest"),
        (b"\x16\x03\x01\x02\x00\x01\x00secret\r\n\r\n", 400, "InvalidRequest"),
        (b"GET /hello HTTP/1.1\r\nsecret\r\n\r\n", 400, "InvalidRequest"),
        (b"GET /hello HTTP/1.1\r\n\r\n", 400, "InvalidRequest"),
    ],
    ids=["field", "line", "fields", "head", "late-head", "empty-lines", "garbage", "tls",
         "no-colon", "no-host"],
)  # fmt: skip
async def test_what_is_not_a_request_is_refused_in_json_without_an_echo(
    request_: bytes, status: int, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with guarded() as site:
        got, headers, body = await (await site.connect()).refusal(request_)
        assert (got, body["error"]) == (status, name)
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert headers.get("server", "sse_labels") == "sse_labels"
        assert "secret" not in body["message"]
        assert site.metrics.requests_refused[name] == 1
    # Strangers must not be able to fill the log, and what they sent may hold a token.
    assert {record.levelname for record in caplog.records} <= {"DEBUG"}
    assert "secret" not in caplog.text


async def test_requests_sent_ahead_behind_a_stream_are_bounded() -> None:
    async with guarded() as site:
        client = await site.connect()
        await client.ask(STREAM)
        await client.until_text(b"opened\n")
        ahead = b"GET /hello HTTP/1.1\r\nHost: test\r\nX: " + b"x" * 8000 + b"\r\n\r\n"
        client.writer.write(ahead * 40)
        await site.until(lambda: site.guard.open == 0)
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
        await client.close()


async def test_two_requests_sent_at_once_are_answered_in_order() -> None:
    async with guarded() as site:
        client = await site.connect()
        assert (await client.ask(GET + GET.replace(b"hello", b"nothing")))[0] == 200
        assert (await client.answer())[0] == 404
        await client.close()


async def test_clients_that_vanish_leave_nothing_behind() -> None:
    async with guarded(max_connections=10_000) as site:
        loop = asyncio.get_running_loop()
        descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())
        for _ in range(20):
            clients = [socket.socket() for _ in range(100)]
            for number, client in enumerate(clients):
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", site.port))
                # Silent, in the middle of a head, in the middle of a stream.
                client.send((b"x", STREAM[:30], STREAM)[number % 3])
            for client in clients:
                client.close()
        await site.until(lambda: site.guard.open == 0)
        await site.until(lambda: len(asyncio.all_tasks()) == tasks)
        assert open_descriptors() == descriptors
        assert len(site.guard.terms.heads) == len(site.guard.terms.answers) == 0
        assert len(site.guard.per_address) == 0


async def test_connection_that_fails_on_its_way_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise OSError("made for this test")

    async with guarded(per_address=10) as site:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "connect_accepted_socket", fail)
            client = await site.connect()
            assert await client.until_closed() == b""
        assert site.guard.open == len(site.guard.per_address) == 0
        assert "made for this test" in caplog.text
        client = await site.connect()
        assert (await client.ask())[0] == 200
        await client.close()


async def test_leaving_ends_those_that_are_being_refused() -> None:
    descriptors = open_descriptors()
    async with guarded(max_connections=0) as site:
        client = await site.connect()
        await site.until(lambda: site.metrics.requests_refused["TooManyConnections"] == 1)
    await client.refusal()
    assert open_descriptors() == descriptors


def test_limit_of_connections_leaves_descriptors_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    allowed = most_connections(15_000, others=20)
    assert 500 < allowed < 1024 - 20 - open_descriptors()
    assert "max_connections=15000" in caplog.text
    assert most_connections(100, others=20) == 100
    # With very few, refusals do not take them all.
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    few = 256 - 20 - open_descriptors()
    assert few // 2 < most_connections(15_000, others=20) < few


async def test_out_of_descriptors_clients_are_refused_and_the_others_live() -> None:
    """The limit alone makes this impossible; here it is off, and a child runs out."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sse_labels.__file__).parents[1])}
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        site = Site(None, Metrics(), int(await child.stdout.readline()))  # type: ignore[arg-type]
        streams: list[Client] = []
        refused = 0
        for _ in range(100):
            client = await site.connect()
            status, _, body = await client.ask(STREAM)
            if status == 200:
                await client.until_text(b"opened\n")
                streams.append(client)
            else:
                assert (status, json.loads(body)["error"]) == (503, "TooManyConnections")
                assert await client.until_closed() == b""
                refused += 1
        assert 20 < len(streams) < 64
        assert refused == 100 - len(streams)
        # It recovers: places that are free again are used again.
        for client in streams[:5]:
            await client.close()
        del streams[:5]
        accepted = 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while accepted < 5:
                client = await site.connect()
                if (await client.ask())[0] == 200:
                    streams.append(client)
                    accepted += 1
                else:
                    await client.until_closed()
        child.stdin.write(b"news\n")
        for client in streams[:-5]:
            await client.until_text(b"news\n")
        for client in streams:
            await client.close()
    finally:
        child.kill()
        _, errors = await child.communicate()
    # Not one line for each place in the backlog, as asyncio itself writes.
    assert 1 <= len(errors.splitlines()) < 20


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def run_out_of_descriptors() -> None:
    """The child: a guarded application that may open 64 files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    async with guarded(max_connections=1_000_000) as site:
        sys.stdout.write(f"{site.port}\n")
        sys.stdout.flush()
        asyncio.get_running_loop().add_reader(0, site.news.set)
        await site.news.wait()
        await asyncio.sleep(PATIENCE_SECONDS)


if __name__ == "__main__":
    asyncio.run(run_out_of_descriptors())
