"""Bearer tokens (RFC 6750): find them in a request, check publish tokens, and refuse.

Promises: a publish token is compared in constant time. No token is logged.
Does not belong here: a reader's token (`auth`).
"""

from __future__ import annotations

from typing import TypeVar

from aiohttp import hdrs, web

from sse_labels.errors import AuthRequired, Forbidden, RequestError
from sse_labels.publishing.tokens import PublishTokens

Error = TypeVar("Error", bound=RequestError)


def bearer_tokens(request: web.Request) -> list[str]:
    """Return the tokens of all headers `Authorization: Bearer …`, also empty tokens."""
    given = (value.partition(" ") for value in request.headers.getall(hdrs.AUTHORIZATION, []))
    return [token.strip() for scheme, _, token in given if scheme.lower() == "bearer"]


def challenged(error: Error, code: str, description: str) -> Error:
    """Return `error` with the challenge of RFC 6750, 3. `description` is ASCII without quotes."""
    error.headers = {
        hdrs.WWW_AUTHENTICATE: f'Bearer realm="sse-labels", error="{code}", '
        f'error_description="{description}"'
    }
    return error


def holder_of(request: web.Request, tokens: PublishTokens, right: str, off: str) -> str:
    """Return the name of the token's holder. Raises AuthRequired or Forbidden.

    `off` is the message for a server that knows no token.
    """
    if tokens.empty:
        raise Forbidden(off)
    token = next(filter(None, bearer_tokens(request)), None)
    if token is None:
        raise AuthRequired("expected the header Authorization: Bearer <token>")
    holder = tokens.find(token)
    if holder is None:
        reason = "this token is not known here"
        raise challenged(AuthRequired(reason), "invalid_token", reason)
    if right not in holder.rights:
        raise Forbidden(f"{holder.name} may not {right}")
    return holder.name
