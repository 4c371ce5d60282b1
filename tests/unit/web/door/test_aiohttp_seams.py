"""One canary for each part of aiohttp that it does not document: which one fails says what changed.

Each runs a real connection through aiohttp's server; none knows the rest of this program.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter

from sse_labels.web.door.aiohttp_seams import (
    ContentEncodingError,
    HeadWithBody,
    LineTooLong,
    LongAnswer,
    Protocol,
    report_requests,
)

PATIENCE_SECONDS = 20.0
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
OPTIONS = {"access_log": None, "keepalive_timeout": 60.0, "lingering_time": 1.0, "max_headers": 9,
           "max_line_size": 500, "max_field_size": 500}  # fmt: skip

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Watched(Protocol):
    """Notes what it is called for."""

    def __init__(self, server: web.Server) -> None:
        super().__init__(server, asyncio.get_running_loop(), OPTIONS)
        self.seen: list[Any] = []

    def data_received(self, data: bytes) -> None:
        self.seen.append(data)
        super().data_received(data)

    def request_began(self, body: StreamReader) -> None:
        self.seen.append("request")

    def answer_began(self) -> None:
        self.seen.append("answer")

    def answer_to_no_request(self, error: BaseException | None) -> web.Response:
        self.seen.append(type(error))
        return web.Response(status=400, text="ours")


@contextlib.asynccontextmanager
async def connected(
    handler: Handler,
) -> AsyncIterator[tuple[Watched, asyncio.StreamReader, asyncio.StreamWriter]]:
    """One connection to a server whose requests `handler` answers."""
    server = web.Server(handler)
    report_requests(server)
    protocols: list[Watched] = []

    def make() -> Watched:
        protocols.append(Watched(server))
        return protocols[-1]

    listener = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
            try:
                writer.write(GET)
                await reader.readuntil(b"\r\n\r\n")
                yield protocols[0], reader, writer
            finally:
                writer.close()
    finally:
        listener.close()
        await server.shutdown()


async def empty(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response()


async def test_the_server_makes_requests_by_its_factory_and_answers_by_finish_response() -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request.protocol, Watched)
        request.protocol.seen.append("handler")
        return web.Response()

    async with connected(handle) as (protocol, _, _):
        assert protocol.seen[1:] == ["request", "handler", "answer"]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"nonsense\r\n\r\n", "BadHttpMethod"),
        (GET[:-2] + b"A: " + b"x" * 501 + b"\r\n\r\n", LineTooLong.__name__),
        (GET[:-2] + b"Content-Encoding: zstd\r\nContent-Length: 1\r\n\r\nx",
         ContentEncodingError.__name__),
        (GET[:-2] + b"A: b\r\n" * 10 + b"\r\n", "BadHttpMessage"),
    ],
    ids=["no request", "line too long", "coding", "too many headers"],
)  # fmt: skip
async def test_handle_error_answers_what_is_no_request(sent: bytes, error: str) -> None:
    async with connected(empty) as (protocol, reader, writer):
        writer.write(sent)
        assert (await reader.read()).endswith(b"\r\n\r\nours")
        assert error in [seen.__name__ for seen in protocol.seen if isinstance(seen, type)]


async def test_handle_error_answers_a_handler_that_failed_by_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        raise ValueError

    async with connected(fail) as (protocol, _, _):
        assert protocol.seen[1:] == ["request", "answer"]
    assert "ValueError" in caplog.text


async def test_write_eof_writes_a_long_answer_when_its_handler_has_returned() -> None:
    done: list[str] = []

    class Late(LongAnswer):
        def write_eof(self, data: bytes = b"") -> Any:
            done.append("write_eof")
            return super().write_eof(b"late")

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return Late()
        finally:
            done.append("handler")

    async with connected(handle) as (protocol, reader, _):
        assert b"late" in await reader.readuntil(b"0\r\n\r\n")
        assert done == ["handler", "write_eof"]
        assert protocol.seen[1:] == ["request"]


@pytest.mark.parametrize("kind", [LongAnswer, HeadWithBody])
async def test_send_headers_immediately_lets_the_head_wait_for_the_body(
    kind: type[LongAnswer],
) -> None:
    sent: list[int] = []

    class Counted(kind):  # type: ignore[misc, valid-type]
        async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
            self.headers["A"] = "b"
            writer = await super().prepare(request)
            assert writer is not None
            sent.append(writer.output_size)
            self.headers.clear()
            return writer

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return Counted()

    async def twice(request: web.BaseRequest) -> web.StreamResponse:
        response = await handle(request)
        await response.prepare(request)
        return response

    async with connected(twice) as (_, reader, writer):
        writer.write(GET)
        assert b"A: b\r\n" in await reader.readuntil(b"\r\n\r\n0\r\n\r\n")
    assert all(size > 0 for size in sent) == (kind is LongAnswer)


async def test_what_is_written_to_the_transport_follows_what_write_was_awaited_for() -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        assert request.transport is not None
        for piece in (b"a", b"c"):
            await response.write(piece)
            request.transport.write(b"1\r\n%b\r\n" % bytes([piece[0] + 1]))
        return response

    async with connected(handle) as (_, reader, _):
        body = await reader.readuntil(b"0\r\n\r\n")
    assert b"".join(body.split(b"\r\n")[1:-2:2]) == b"abcd"


async def test_data_received_is_called_with_nothing_after_a_pause() -> None:
    go_on = asyncio.Event()
    go_on.set()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await go_on.wait()
        return web.Response()

    async with connected(handle) as (protocol, reader, _):
        go_on.clear()
        protocol.data_received(GET * 100 + LAST)
        go_on.set()
        answers = await reader.read()
        assert answers.count(b"HTTP/1.1 200") == 101
        assert b"" in protocol.seen


async def test_force_close_closes_the_transport_and_forgets_it() -> None:
    async with connected(empty) as (protocol, reader, _):
        transport = protocol.transport
        assert transport is not None
        protocol.force_close()
        assert transport.is_closing()
        assert protocol.transport is None
        assert await reader.read() == b""
