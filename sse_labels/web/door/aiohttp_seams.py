"""Every undocumented part of aiohttp that this server uses, as read in aiohttp 3.14.5.

Each part stands here once. Its docstring says what breaks when aiohttp changes it, and
`test_aiohttp_seams.py` has a test for it. pyproject.toml pins aiohttp's minor version.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import ContentEncodingError, LineTooLong

#: aiohttp passes the two error classes to `handle_error`. If aiohttp changes the classes, the
#: server answers these errors with status 400.
__all__ = ["ContentEncodingError", "HeadWithBody", "LineTooLong", "LongAnswer", "Protocol"]


class LongAnswer(web.StreamResponse):
    """An answer that writes its body in `write_eof`. It may take long, and sets its own time limit.

    aiohttp calls `prepare` and then `write_eof` after the handler and all middlewares have
    returned. If the handler wrote the stream, their Python frames would stay in memory as long as
    the stream is open: 3 KiB for each stream. If aiohttp changes this, streams stay empty.
    """


class HeadWithBody(LongAnswer):
    """A long answer whose head is sent together with the first bytes of its body.

    aiohttp's `Response` does the same. The headers may be cleared after `prepare`. If aiohttp
    changes this, each stream costs one more packet, or its head is empty.
    """

    _send_headers_immediately = False


class Protocol(web.RequestHandler, ABC):
    """aiohttp's protocol of one connection, with methods that subclasses override.

    aiohttp documents the parameters of `__init__` for `AppRunner` only. If aiohttp changes them,
    no connection is served.

    Subclasses rely on three more facts:
    aiohttp itself also calls `data_received`, with no bytes, to continue after a pause. If this
    changes, the check for empty data can go.
    `force_close` closes the transport and drops its reference to the transport, although the
    client may not have read everything. If this changes, the reference that `ClientConnection`
    keeps can go.
    Bytes written to the transport come after all bytes of an awaited `write` of the response. If
    this changes, events are sent before the head of their stream.
    """

    __slots__ = ()

    def __init__(
        self, server: web.Server, loop: asyncio.AbstractEventLoop, options: dict[str, Any]
    ) -> None:
        super().__init__(server, loop=loop, **options)

    def request_began(self, body: StreamReader) -> None:
        """Note that the head of a request is complete. Its handler runs next."""

    def answer_began(self) -> None:
        """Note that a handler has returned an answer that is not a long one."""

    @abstractmethod
    def answer_to_no_request(self, error: BaseException | None) -> web.Response:
        """Return the answer to bytes that cannot be parsed as a request."""

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Send an answer. If aiohttp changes this, clients that do not read are not cut off."""
        if not isinstance(resp, LongAnswer):
            self.answer_began()
        return super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer an error. If aiohttp changes this, aiohttp's own text answers a bad request."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        response = self.answer_to_no_request(exc)
        response.force_close()
        return response


def report_requests(server: web.Server) -> None:
    """Make `server` call `request_began` of a connection, through its `request_factory`.

    A middleware could do the same, but a middleware stays on the stack of every stream: 0.5 KiB
    for each. If aiohttp changes this, requests that take longer than the time for a head are
    answered with status 408.
    """
    make_request: Callable[..., web.BaseRequest] = server.request_factory

    def make_and_report(
        message: RawRequestMessage, payload: StreamReader, protocol: web.RequestHandler, *rest: Any
    ) -> web.BaseRequest:
        if isinstance(protocol, Protocol):
            protocol.request_began(payload)
        return make_request(message, payload, protocol, *rest)

    server.request_factory = make_and_report
