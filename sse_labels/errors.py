"""All errors that this package raises on purpose, in one tree.

Promises: callers act by the class, humans read the message. Class and message are enough to answer
a request or to end a stream.

    SseLabelsError
    ├── ConfigError               names the setting, its value, the expected value
    │   └── SchemaError           this program cannot serve from this database
    ├── DatabaseUnavailable       away: wait and try again; the driver's error is its __cause__
    ├── DatabaseRefused           refused because of a right, a value, a trigger: do not try again
    ├── BrokenPromise             the promised order or completeness did not hold
    ├── RequestError              has .status and .name, becomes the JSON answer
    │   ├── InvalidRequest 400, FutureCursor 400
    │   ├── AuthRequired 401, Forbidden 403, PayloadTooLarge 413
    │   ├── NoSuchStream 404
    │   ├── EpochChanged 409, InvalidLabel 422, IdempotencyKeyReused 422, LabelsRefused 422
    │   ├── RequestTimeout 408, HeadTooLarge 431
    │   ├── ComeBackLater 429         says when to try again
    │   │   └── TooManyFromAddress, RateLimited
    │   └── TooManyConnections 503, NotReady 503
    └── StreamClosed              has .name, becomes the stream's last event
        ├── ConsumerTooSlow, TokenExpired, StreamCut, HistoryRefused
        └── ServerStopping
"""

from __future__ import annotations

import math
from collections.abc import Mapping


class SseLabelsError(Exception):
    """The base of all errors of this package."""


class ConfigError(SseLabelsError):
    """A setting cannot be used. The message names its key, its value and the expected value."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        given = "not given" if value is None else f"got {value!r}"
        super().__init__(f"{key}: {given}, expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class SchemaError(ConfigError):
    """The database answers, but this program cannot serve from its schema or with this role."""


class DatabaseUnavailable(SseLabelsError):
    """The database is away or too busy: wait and try again. The driver's error is `__cause__`."""


class DatabaseRefused(SseLabelsError):
    """The database refused a statement, and would refuse it again.

    The message names the reason and, if known, the remedy.
    """

    def __init__(self, message: str, *, of_values: bool = False) -> None:
        super().__init__(message)
        #: Whether the values were refused, by a constraint or a trigger. If False, the statement
        #: itself was refused, for example because a right is missing.
        self.of_values = of_values


class BrokenPromise(SseLabelsError):
    """A promise of this service did not hold: seqs went back, or are missing. Never hidden."""


class RequestError(SseLabelsError):
    """The request is answered with `status` and `{"error": name, "message": str(self)}`."""

    status = 400
    name: str
    #: Extra response headers, e.g. `WWW-Authenticate`.
    headers: Mapping[str, str] = {}

    def __init_subclass__(cls, status: int | None = None) -> None:
        cls.name = cls.__name__
        cls.status = status or cls.status


class InvalidRequest(RequestError):
    """The request itself is wrong. The same request cannot succeed later."""


class FutureCursor(RequestError):
    """The cursor is beyond the newest seq in the database."""


class AuthRequired(RequestError, status=401):
    """The request has no token, or an unknown token (RFC 6750, section 3)."""

    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer realm="sse-labels"'}


class Forbidden(RequestError, status=403):
    """The token is known, but a right is missing."""


class NoSuchStream(RequestError, status=404):
    """No stream with this id is open."""


class PayloadTooLarge(RequestError, status=413):
    """The body is larger than the limit."""


class UnsupportedMediaType(RequestError, status=415):
    """The body's coding is not supported (RFC 9110, section 15.5.16)."""

    headers: Mapping[str, str] = {"Accept-Encoding": "gzip, deflate"}


class UpgradeRequired(RequestError, status=426):
    """A WebSocket handshake has an unsupported version (RFC 6455, section 4.4)."""

    headers: Mapping[str, str] = {
        "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
    }  # fmt: skip


class InvalidLabel(RequestError, status=422):
    """A label breaks the lexicon. The message names its index in the request and the field."""

    def __init__(self, field: str, problem: str, index: int | None = None) -> None:
        where = field if index is None else f"labels[{index}]" + (f".{field}" if field else "")
        super().__init__(f"{where}: {problem}" if where else problem)
        self.field = field
        self.problem = problem
        self.index = index

    def at(self, index: int) -> InvalidLabel:
        """Return the same error for the label at `index` (from 0) of a request."""
        return InvalidLabel(self.field, self.problem, index)


class IdempotencyKeyReused(RequestError, status=422):
    """An Idempotency-Key was used before for other labels (draft-ietf-httpapi-idempotency-key)."""


class LabelsRefused(RequestError, status=422):
    """A constraint or a trigger of the database refuses these labels."""


class EpochChanged(RequestError, status=409):
    """The cursor is from another epoch of the database. Its seq means another label now."""


class TooManyConnections(RequestError, status=503):
    """The server has as many streams as it may have."""


class RequestTimeout(RequestError, status=408):
    """The request was not complete in time (RFC 9110, section 15.5.9)."""

    # The rest of the body may still arrive, so the connection cannot be used again.
    headers: Mapping[str, str] = {"Connection": "close"}


class HeadTooLarge(RequestError, status=431):
    """The request's head is larger than the limit (RFC 6585, section 5)."""


class ComeBackLater(RequestError, status=429):
    """Too many requests from one client (RFC 6585, section 4). `Retry-After` says when to retry."""

    def __init__(self, message: str, after_seconds: float) -> None:
        super().__init__(message)
        #: Whole seconds, rounded up, at least 1 (RFC 9110, section 10.2.3).
        self.after_seconds = max(1, math.ceil(after_seconds))
        self.headers = {"Retry-After": str(self.after_seconds)}


class TooManyFromAddress(ComeBackLater):
    """One address has as many streams or connections as it may have."""


class RateLimited(ComeBackLater):
    """A publisher exceeds its rate. No label was stored."""


class NotReady(RequestError, status=503):
    """The database is away, or the sequencer has no head yet. The client may try again soon."""


class StreamClosed(SseLabelsError):
    """A stream ends. `name` and the message become its last event."""

    name: str

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__


class ConsumerTooSlow(StreamClosed):
    """More events wait for the consumer than its outbox may hold."""


class TokenExpired(StreamClosed):
    """The token that opened the stream is no longer valid."""


class StreamCut(StreamClosed):
    """An operator ended this stream."""


class HistoryRefused(StreamClosed):
    """The database does not let this server read the labels for the consumer."""

    def __init__(
        self,
        message: str = "the database does not let this server read more labels; the server's log "
        "says why",
    ) -> None:
        super().__init__(message)


class ServerStopping(StreamClosed):
    """The server shuts down. A client that reconnects with the last id loses no event."""
