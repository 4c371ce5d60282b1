"""What this server uses of aiohttp that aiohttp does not document, read in 3.14.5.

Promises: each such part stands here once, with what breaks when aiohttp changes it, and has a
test of its name in `test_aiohttp_seams.py`; pyproject.toml pins aiohttp's minor version.
Does not belong here: what `web` does at these places.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import ContentEncodingError, LineTooLong

#: Two are errors that `handle_error` is given. If their classes change, they are answered 400.
__all__ = ["ContentEncodingError", "HeadWithBody", "LineTooLong", "LongAnswer", "Protocol"]


class LongAnswer(web.StreamResponse):
    """An answer that writes its body in `write_eof`, takes its time, and bounds it itself.

    aiohttp calls `prepare` and then `write_eof` once the handler and all around it have returned:
    had the handler streamed, their frames would wait as long as the stream does, 3 KiB for each.
    If this changes, streams stay empty.
    """


class HeadWithBody(LongAnswer):
    """A long answer whose head leaves with the first bytes of its body.

    aiohttp's `Response` does so, too. The headers may be cleared once it is prepared. If this
    changes, each stream costs one packet more, or its head is empty.
    """

    _send_headers_immediately = False


class Protocol(web.RequestHandler):
    """aiohttp's protocol of one connection, with the places where others take part.

    aiohttp makes it, and documents its parameters for `AppRunner` alone. If they change, no
    connection is served.

    Three more facts that its heirs use:
    `data_received` is also called by aiohttp itself, with nothing, to go on after a pause. If this
    changes, the check for it can go.
    `force_close` closes the transport and forgets it, although its client may not have read yet.
    If this changes, the reference that `ClientConnection` keeps can go.
    What is written to the transport follows what the response's `write` was awaited for. If this
    changes, events stand before the head of their stream.
    """

    __slots__ = ()

    def __init__(
        self, server: web.Server, loop: asyncio.AbstractEventLoop, options: dict[str, Any]
    ) -> None:
        super().__init__(server, loop=loop, **options)

    def request_began(self, body: StreamReader) -> None:
        """The head of a request is whole, and its handler will run."""

    def answer_began(self) -> None:
        """A handler has returned, and its answer is not a long one."""

    def answer_to_no_request(self, error: BaseException | None) -> web.Response:
        """Return the answer to what cannot be read as a request."""
        raise NotImplementedError

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Send an answer. If this changes, clients that do not read it are not cut."""
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
        """Answer an error. If this changes, what is no request is answered in aiohttp's words."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        response = self.answer_to_no_request(exc)
        response.force_close()
        return response


def tell_of_requests(server: web.Server) -> None:
    """Let `server` call `request_began` of its connections, by its attribute `request_factory`.

    A middleware could do that, too, but would stay on the stack of every stream: 0.5 KiB each.
    If this changes, requests that take longer than their head may are answered 408.
    """
    make_request: Callable[..., web.BaseRequest] = server.request_factory

    def make_and_tell(
        message: RawRequestMessage, payload: StreamReader, protocol: web.RequestHandler, *rest: Any
    ) -> web.BaseRequest:
        if isinstance(protocol, Protocol):
            protocol.request_began(payload)
        return make_request(message, payload, protocol, *rest)

    server.request_factory = make_and_tell
