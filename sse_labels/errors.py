"""Every error this package raises on purpose, in one tree.

Promises: callers act by class, humans read the message, and nothing else is
needed to answer a request or to end a stream.
Stands beside the corridor: every room may import it, it imports nothing.
Does not belong here: turning an error into bytes (`web.answers`, `sse`).

    SseLabelsError
    ├── ConfigError               names the setting, its value, what was expected
    │   └── SchemaError           the database is not one this program can serve from
    ├── DatabaseUnavailable       away: wait and try again; the driver's error is its __cause__
    ├── DatabaseRefused           it said no (a right, a value, a trigger), and will again
    ├── BrokenPromise             an order or a completeness of ours did not hold
    ├── RequestError              has .status and .name, becomes the JSON answer
    │   ├── InvalidRequest 400, FutureCursor 400
    │   ├── AuthRequired 401, Forbidden 403, PayloadTooLarge 413
    │   ├── NoSuchStream 404
    │   ├── EpochChanged 409, InvalidLabel 422, IdempotencyKeyReused 422, LabelsRefused 422
    │   ├── RequestTimeout 408, HeadTooLarge 431
    │   ├── ComeBackLater 429         says when
    │   │   └── TooManyFromAddress, RateLimited
    │   └── TooManyConnections 503, NotReady 503
    └── StreamClosed              has .name, becomes the stream's last event
        ├── ConsumerTooSlow, TokenExpired, StreamCut, HistoryRefused
        └── ServerStopping
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType


class SseLabelsError(Exception):
    """The base of all errors of this package."""


class ConfigError(SseLabelsError):
    """A setting that cannot be used; the message names its key, its value, what was expected."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        given = "not given" if value is None else f"got {value!r}"
        super().__init__(f"{key}: {given}, expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class SchemaError(ConfigError):
    """The database answers, but its schema or its role is not one this program can serve from."""


class DatabaseUnavailable(SseLabelsError):
    """The database is away or too busy: wait, and try again; the driver's error is `__cause__`."""


class DatabaseRefused(SseLabelsError):
    """The database said no, and will again; the message names what and, if known, the remedy."""

    def __init__(self, message: str, *, of_values: bool = False) -> None:
        super().__init__(message)
        #: Whether other values might have been taken (a constraint, a trigger), not a right that
        #: is missing, say.
        self.of_values = of_values


class BrokenPromise(SseLabelsError):
    """A promise of this service did not hold (a hole, a step back); never papered over."""


class RequestError(SseLabelsError):
    """A request that is answered with `status` and `{"error": name, "message": str(self)}`."""

    status = 400
    name = "InvalidRequest"
    #: Extra response headers, e.g. `WWW-Authenticate`.
    headers: Mapping[str, str] = MappingProxyType({})


class InvalidRequest(RequestError):
    """The request itself is wrong; asking again the same way cannot help."""


class FutureCursor(RequestError):
    """The cursor lies beyond the newest seq that the database knows."""

    name = "FutureCursor"


class AuthRequired(RequestError):
    """No token, or one that nobody here knows (RFC 6750, section 3)."""

    status = 401
    name = "AuthRequired"
    headers: Mapping[str, str] = MappingProxyType({"WWW-Authenticate": 'Bearer realm="sse-labels"'})


class Forbidden(RequestError):
    """The token is known, the right is missing."""

    status = 403
    name = "Forbidden"


class NoSuchStream(RequestError):
    """No stream of this id is open, or no longer."""

    status = 404
    name = "NoSuchStream"


class PayloadTooLarge(RequestError):
    """The body is over the limit."""

    status = 413
    name = "PayloadTooLarge"


class UnsupportedMediaType(RequestError):
    """The body's coding is none that is decoded here (RFC 9110, section 15.5.16)."""

    status = 415
    name = "UnsupportedMediaType"
    headers: Mapping[str, str] = MappingProxyType({"Accept-Encoding": "gzip, deflate"})


class UpgradeRequired(RequestError):
    """A WebSocket handshake of a version that is not spoken here (RFC 6455, section 4.4)."""

    status = 426
    name = "UpgradeRequired"
    headers: Mapping[str, str] = MappingProxyType(
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    )


class InvalidLabel(RequestError):
    """A label breaks the lexicon; the message names its index in the request and the field."""

    status = 422
    name = "InvalidLabel"

    def __init__(self, field: str, problem: str, index: int | None = None) -> None:
        where = field if index is None else f"labels[{index}]" + (f".{field}" if field else "")
        super().__init__(f"{where}: {problem}" if where else problem)
        self.field = field
        self.problem = problem
        self.index = index

    def at(self, index: int) -> InvalidLabel:
        """Return the same error for the label at `index` (from 0) of a request."""
        return InvalidLabel(self.field, self.problem, index)


class IdempotencyKeyReused(RequestError):
    """An Idempotency-Key came back with other labels (draft-ietf-httpapi-idempotency-key)."""

    status = 422
    name = "IdempotencyKeyReused"


class LabelsRefused(RequestError):
    """The database does not take these labels: a constraint or a trigger of its own says no."""

    status = 422
    name = "LabelsRefused"


class EpochChanged(RequestError):
    """The cursor is from another life of the database: its seqs name other labels now."""

    status = 409
    name = "EpochChanged"


class TooManyConnections(RequestError):
    """The server holds as many streams as it may."""

    status = 503
    name = "TooManyConnections"


class RequestTimeout(RequestError):
    """The request did not become whole in time (RFC 9110, section 15.5.9)."""

    status = 408
    name = "RequestTimeout"
    # What is left of the body is not waited for, so the connection cannot be used again.
    headers = MappingProxyType({"Connection": "close"})


class HeadTooLarge(RequestError):
    """The request's head is over the limit (RFC 6585, section 5)."""

    status = 431
    name = "HeadTooLarge"


class ComeBackLater(RequestError):
    """Too much from one client (RFC 6585, section 4); `Retry-After` says when to come back."""

    status = 429
    name = "TooManyRequests"

    def __init__(self, message: str, after_seconds: float) -> None:
        super().__init__(message)
        #: Whole seconds, rounded up, at least 1 (RFC 9110, section 10.2.3).
        self.after_seconds = max(1, math.ceil(after_seconds))
        self.headers = {"Retry-After": str(self.after_seconds)}


class TooManyFromAddress(ComeBackLater):
    """One address holds as many streams or connections as it may."""

    name = "TooManyFromAddress"


class RateLimited(ComeBackLater):
    """A publisher is over its rate; nothing was stored."""

    name = "RateLimited"


class NotReady(RequestError):
    """The database is away or the sequencer has no head yet; try again soon."""

    status = 503
    name = "NotReady"


class StreamClosed(SseLabelsError):
    """A stream ends; `name` and the message become its last event."""

    name = "StreamClosed"


class ConsumerTooSlow(StreamClosed):
    """More events waited for the consumer than its outbox may hold."""

    name = "ConsumerTooSlow"


class TokenExpired(StreamClosed):
    """The token that opened the stream is no longer valid."""

    name = "TokenExpired"


class StreamCut(StreamClosed):
    """An operator ended this stream."""

    name = "StreamCut"


HISTORY_REFUSED = (
    "the database does not let this server read on; its operator can see why in its log"
)


class HistoryRefused(StreamClosed):
    """The database does not let this server read what the consumer is to get."""

    name = "HistoryRefused"

    def __init__(self, message: str = HISTORY_REFUSED) -> None:
        super().__init__(message)


class ServerStopping(StreamClosed):
    """The server shuts down; reconnecting with the last id loses nothing."""

    name = "ServerStopping"
