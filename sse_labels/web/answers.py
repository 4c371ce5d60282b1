"""Answers to requests that are not streams: JSON, errors, CORS.

Promises: every error is answered as `{"error": Name, "message": …}` with the right status. An
answer never contains internal data, such as a traceback, a DSN or a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from sse_labels.errors import (
    DatabaseRefused,
    DatabaseUnavailable,
    NotReady,
    PayloadTooLarge,
    RequestError,
)
from sse_labels.metrics import Metrics
from sse_labels.protocol.sse import dumps
from sse_labels.web.addresses import caused_by
from sse_labels.web.parameters import check_encoding

log = logging.getLogger(__name__)

#: How long a client should wait after a 503, in seconds.
RETRY_AFTER_SECONDS = 5
#: The response headers that a page of another origin may read.
EXPOSED_HEADERS = "Sse-Labels-Head, Sse-Labels-Epoch, Retry-After, WWW-Authenticate"
#: The header Server of every answer. aiohttp's own value contains its version and Python's.
SERVER = "sse_labels"
#: The headers of every answer. A browser must not guess another type, show the answer in a frame,
#: load anything for it, or send its URL, which may contain a token, to other sites (OWASP Secure
#: Headers Project).
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    hdrs.SERVER: SERVER,
}
#: The request headers that such a page may send when its preflight names none.
ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
#: How long a browser may remember a preflight, in seconds.
PREFLIGHT_SECONDS = 86_400


def json_response(value: object, *, status: int = 200) -> web.Response:
    """Return `value` as compact JSON with a line end, for clients in a shell."""
    return web.Response(
        text=f"{dumps(value)}\n",
        status=status,
        content_type="application/json",
        headers={hdrs.CACHE_CONTROL: "no-store"},
    )


def error_response(error: RequestError) -> web.Response:
    """Return the JSON answer of an error."""
    response = json_response({"error": error.name, "message": str(error)}, status=error.status)
    response.headers.update(error.headers)
    if error.status == 503:
        response.headers[hdrs.RETRY_AFTER] = str(RETRY_AFTER_SECONDS)
    return response


def errors_as_json(metrics: Metrics, client: Callable[[web.Request], str]) -> Middleware:
    """Return the middleware that turns every error into an answer, and counts the error.

    `client` returns the client's address.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            check_encoding(request)
            return await handler(request)
        except RequestError as error:
            answer = error_response(error)
            name = error.name
        except ConnectionResetError:
            # The client left during the answer. Nobody reads this answer, and it is not an error.
            return web.Response(status=400)
        except DatabaseUnavailable as error:
            log.warning(
                "a request needs the database",
                extra=caused_by(client(request), path=request.path, error=error),
            )
            answer = error_response(NotReady("the database is away; try again soon"))
            name = NotReady.name
        except DatabaseRefused as error:
            # Only the operator may know the details, not the client.
            log.error(
                "the database refuses a request",
                extra=caused_by(client(request), path=request.path, error=error),
            )
            name = type(error).__name__
            message = "the database does not let this server do that; its log says why"
            answer = json_response({"error": name, "message": message}, status=500)
        except web.HTTPMethodNotAllowed as error:
            allow = ", ".join(sorted({*error.allowed_methods, hdrs.METH_OPTIONS}))
            if request.method == hdrs.METH_OPTIONS:
                return web.Response(status=204, headers={hdrs.ALLOW: allow})
            answer, name = _from_aiohttp(error)
            answer.headers[hdrs.ALLOW] = allow
        except web.HTTPException as error:
            if error.status < 400:
                raise
            answer, name = _from_aiohttp(error)
        except Exception:
            log.exception(
                "a request failed",
                extra=caused_by(client(request), path=request.path),
            )
            name = "InternalServerError"
            answer = json_response({"error": name, "message": "see the server's log"}, status=500)
        metrics.requests_refused[name] += 1
        return answer

    return middleware


def _from_aiohttp(error: web.HTTPException) -> tuple[web.Response, str]:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        too_large = PayloadTooLarge("the body is over the limit")
        return error_response(too_large), too_large.name
    name = error.reason.title().replace(" ", "")
    return json_response({"error": name, "message": error.reason}, status=error.status), name


async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the security headers. A handler may set its own Content-Security-Policy."""
    own = response.headers.get("Content-Security-Policy")
    response.headers.update(SECURITY_HEADERS)
    if own is not None:
        response.headers["Content-Security-Policy"] = own


def allow_origins(app: web.Application, origins: tuple[str, ...]) -> None:
    """Let pages of `origins` read (Fetch standard, CORS protocol). `*` means every origin."""
    if not origins:
        return

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        if "*" not in origins:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or ("*" not in origins and origin not in origins):
            return
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if "*" in origins else origin
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED_HEADERS

    app.on_response_prepare.append(add_headers)
    # A middleware in place of a route: a route for every path would turn each 404 into a 405.
    app.middlewares.insert(0, preflight)


@web.middleware
async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a browser's preflight. `add_headers` adds the allowed origin."""
    if (
        request.method != hdrs.METH_OPTIONS
        or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers
    ):
        return await handler(request)
    response = await handler(request)
    if response.status == 204:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = response.headers[hdrs.ALLOW]
        # Allow all headers that the preflight names: clients of the protocol send their own
        # (`atproto-accept-labelers`). A text that is not ASCII is not a header's name.
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        allowed = asked if asked and asked.isascii() else ALLOWED_HEADERS
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = allowed
        response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = str(PREFLIGHT_SECONDS)
    return response
