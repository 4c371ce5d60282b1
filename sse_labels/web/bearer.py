"""Whose token came with a request, and whether it has the right.

Promises: a token is compared in constant time and never logged.
Stands at the door for publishers and operators.
Does not belong here: what the right opens; tokens for reading (`auth`).
"""

from __future__ import annotations

from aiohttp import hdrs, web

from sse_labels.errors import AuthRequired, Forbidden
from sse_labels.publish_tokens import PublishTokens

#: RFC 6750, section 3.1.
BAD_TOKEN = 'Bearer realm="sse-labels", error="invalid_token"'  # noqa: S105


def holder_of(request: web.Request, tokens: PublishTokens, right: str, off: str) -> str:
    """Return the name of the token's holder; raise AuthRequired or Forbidden.

    `off` says why it is closed to everybody, when no token is known.
    """
    if tokens.empty:
        raise Forbidden(off)
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise AuthRequired("expected the header Authorization: Bearer <token>")
    holder = tokens.who(token.strip())
    if holder is None:
        refusal = AuthRequired("this token is not known here")
        refusal.headers = {"WWW-Authenticate": BAD_TOKEN}
        raise refusal
    if right not in holder.rights:
        raise Forbidden(f"{holder.name} may not {right}")
    return holder.name
