"""Decides who may read a stream: everybody, or holders of a JSON Web Token (RFC 7519).

Promises: a token is accepted only when its signature, times, issuer and audience are right and
its claims have the right types. Only the key decides the algorithm. No token, and no part of a
token, is in a message, in a log line or in a repr.
Does not belong here: ending a stream when its token expires (`web.streams`), who may publish
(`publishing.tokens`).

Sources: RFC 6750 (bearer tokens), RFC 7519 (claims), RFC 8725 (best practice).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jwt
from aiohttp import hdrs, web

from sse_labels.config import Settings
from sse_labels.errors import AuthRequired, ConfigError, Forbidden, InvalidRequest
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.formats import is_did
from sse_labels.watched_file import Unusable, WatchedFile
from sse_labels.web.bearer import bearer_tokens, challenged
from sse_labels.web.token_keys import Keys, TokenKey, parse_keys, parse_secret

COOKIE = "sse_labels_token"
QUERY = "access_token"
SOURCES_CLAIM = "sources"
#: The longest validity (exp - iat) of a token in a URL. URLs end up in logs, in histories and in
#: pasted texts, and a token that is found there must have expired. A page needs the token for one
#: connect only.
QUERY_TOKEN_MAX_SECONDS = 300
#: The allowed error of the issuer's clock. RFC 7519, 4.1.4: "usually no more than a few minutes";
#: today NTP keeps clocks more exact.
LEEWAY_SECONDS = 10
#: 9999-12-31T23:59:59Z. A later time is a mistake, such as milliseconds in place of seconds.
TIME_MAX = 253_402_300_799


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may read: labels of `sources` (None: all sources) until `expires_at`."""

    sources: frozenset[str] | None = None
    #: When the token begins to be refused, in seconds since 1970. None: never.
    expires_at: float | None = None
    #: The claim `sub`. The token's issuer chose the text: log it with %r.
    subject: str | None = None


PUBLIC = Grant()


class StreamAuth:
    """Decides what a request may read. Without a key everybody may read everything."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        """Read the key: one secret (HS256), or one file with public keys (PEM or JWKS).

        Raises ConfigError for two keys, for an unusable key, and for an issuer or an audience
        without a key: the operator then believes that streams are protected.
        """
        self._issuer = settings.jwt_issuer
        self._audience = settings.jwt_audience
        self.clock = clock
        self._keys: Callable[[], Keys] | None = None
        secret, secret_file = settings.jwt_secret, settings.jwt_secret_file
        given = {
            "--jwt-secret": secret,
            "--jwt-secret-file": secret_file,
            "--jwt-key-file": settings.jwt_key_file,
        }
        keys = [name for name, value in given.items() if value is not None]
        if len(keys) > 1:
            expected = f"nothing, because {keys[0]} already sets the key"
            raise ConfigError(keys[1], "(not shown)", expected)
        if not keys:
            for name, value in (("--jwt-issuer", self._issuer), ("--jwt-audience", self._audience)):
                if value is not None:
                    raise ConfigError(name, value, f"one of {', '.join(given)} too")
        if secret is not None:
            try:
                key = parse_secret(secret.encode("utf-8", "surrogateescape"))
            except Unusable as error:
                raise ConfigError("--jwt-secret", "(not shown)", str(error)) from None
            self._keys = lambda: key
        elif secret_file is not None:
            self._keys = WatchedFile("--jwt-secret-file", secret_file, parse_secret).value
        elif settings.jwt_key_file is not None:
            self._keys = WatchedFile("--jwt-key-file", settings.jwt_key_file, parse_keys).value

    @property
    def protected(self) -> bool:
        """Return whether reading needs a token."""
        return self._keys is not None

    def authorize(self, request: web.Request, *, by_cookie: bool = True) -> Grant:
        """Return what `request` may read. Without `by_cookie`, cookies are ignored.

        Raises AuthRequired without a valid token, and InvalidRequest for two tokens
        (RFC 6750, 2).
        """
        if self._keys is None:
            return PUBLIC
        token, in_query = _token_of(request, by_cookie)
        if token is None:
            # RFC 6750, 3.1: the answer to a request without a token has no error code.
            raise AuthRequired(
                f"expected a token: Authorization: Bearer, the cookie {COOKIE}, or {QUERY}"
            )
        return self._grant(self._claims(token, self._keys()), in_query)

    def _claims(self, token: str, keys: Keys) -> Mapping[str, object]:
        """Return the claims of a token whose signature, issuer and audience are right."""
        if not token.isascii():
            # aiohttp decodes headers with surrogateescape, and PyJWT cannot encode the result.
            raise _refused("the token is malformed")
        try:
            key = keys if isinstance(keys, TokenKey) else _named(keys, token)
            claims: Mapping[str, object] = jwt.decode(
                token,
                key.material,
                # The key's algorithm, never that of the token's header. Otherwise a token could
                # use the public key as an HMAC secret, or "none" as its signature (RFC 8725, 3.1).
                algorithms=[key.algorithm],
                options={
                    "require": ["exp"],
                    # PyJWT uses the system's clock, and accepts true and "1" as times.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "enforce_minimum_key_length": True,
                },
                issuer=self._issuer,
                audience=self._audience,
            )
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"the claim {error.claim} is missing") from None
        except jwt.PyJWTError as error:
            # PyJWT's messages may quote the token. `from None` keeps them out of tracebacks.
            raise _refused(_REASONS.get(type(error), "the token is malformed")) from None
        return claims

    def _grant(self, claims: Mapping[str, object], in_query: bool) -> Grant:
        now = self.clock()
        expires = _time(claims, "exp")
        not_before = _time(claims, "nbf")
        issued = _time(claims, "iat")
        assert expires is not None  # noqa: S101 - it is required above
        if now >= expires + LEEWAY_SECONDS:
            raise _refused("the token has expired")
        if max(not_before or 0, issued or 0) > now + LEEWAY_SECONDS:
            raise _refused("the token is not valid yet")
        if in_query and issued is None:
            raise _refused("the claim iat is missing: a token in the URL needs it")
        # One second more, for an issuer that reads the clock once for iat and once for exp.
        if in_query and expires - (issued or 0) > QUERY_TOKEN_MAX_SECONDS + 1:
            raise _refused(
                f"a token in the URL may be valid for {QUERY_TOKEN_MAX_SECONDS} seconds at most, "
                "from iat to exp"
            )
        subject = claims.get("sub")
        return Grant(
            _sources(claims),
            # Not earlier than the token is refused: otherwise a stream that opens within the
            # leeway would end at once.
            expires + LEEWAY_SECONDS,
            subject if isinstance(subject, str) else None,
        )


def within_grant(asked: Filter | None, grant: Grant) -> Filter | None:
    """Return `asked` limited to the grant. Raises Forbidden when `asked` exceeds the grant."""
    if grant.sources is None:
        return asked
    if asked is None or not asked.sources:
        return replace(asked or Filter(), sources=grant.sources)
    outside = sorted(asked.sources - grant.sources)
    if outside:
        raise challenged(
            Forbidden(f"sources: this token may not read {outside[0][:60]!r}"),
            "insufficient_scope",
            "a source is not among those of the token",
        )
    return asked


def _named(keys: Mapping[str, TokenKey], token: str) -> TokenKey:
    """Return the key that the token's header names. Nothing else of the header is trusted."""
    kid = jwt.get_unverified_header(token).get("kid")
    key = keys.get(kid) if isinstance(kid, str) else None
    if key is None:
        raise _refused("the token names no key (kid) that is known here")
    return key


def _token_of(request: web.Request, by_cookie: bool) -> tuple[str | None, bool]:
    """Return the token, and whether the URL contains it.

    A token in the header or in the URL wins over the cookie: a browser sends cookies by itself,
    and a page may be unable to delete them. Two tokens outside cookies are refused, because the
    server cannot know which one to use.
    """
    queries = request.query.getall(QUERY, [])
    given = bearer_tokens(request) + queries
    if len(given) > 1:
        raise challenged(
            InvalidRequest(
                f"got {len(given)} tokens, expected one: {hdrs.AUTHORIZATION} or {QUERY}"
            ),
            "invalid_request",
            "more than one token",
        )
    if given:
        if not given[0]:
            raise challenged(InvalidRequest("the token is empty"), "invalid_request", "no token")
        return given[0], bool(queries)
    # A deleted cookie is often sent with an empty value.
    return (request.cookies.get(COOKIE) or None) if by_cookie else None, False


def _time(claims: Mapping[str, object], name: str) -> float | None:
    """Return a NumericDate (RFC 7519, 2). None: the claim is absent."""
    if name not in claims:
        return None
    value = claims[name]
    # In Python a bool is an int, and JSON may contain NaN and Infinity. None of them is a time.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= TIME_MAX:
        raise _refused(f"the claim {name} is not a time in seconds")
    return value


def _sources(claims: Mapping[str, object]) -> frozenset[str] | None:
    if SOURCES_CLAIM not in claims:
        return None
    value = claims[SOURCES_CLAIM]
    # An empty array is refused: a filter without sources would pass all sources.
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(source, str) and is_did(source) for source in value)
    ):
        raise _refused(f"the claim {SOURCES_CLAIM} is not an array of DIDs")
    return frozenset(value)


#: The reason of each PyJWT error, in a text that does not quote the token.
_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.InvalidSignatureError: "the signature does not fit the key",
    jwt.InvalidAlgorithmError: "the algorithm is not the one of the key",
    jwt.InvalidAudienceError: "the audience is not this service",
    jwt.InvalidIssuerError: "the issuer is not the one expected",
}


def _refused(reason: str) -> AuthRequired:
    return challenged(AuthRequired(reason), "invalid_token", reason)
