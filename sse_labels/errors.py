"""Every error this package raises on purpose, in one tree.

Promises: callers act by class, humans read the message, and nothing else is
needed to answer a request or to end a stream.
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
    name: str
    #: Extra response headers, e.g. `WWW-Authenticate`.
    headers: Mapping[str, str] = {}

    def __init_subclass__(cls, status: int | None = None) -> None:
        cls.name = cls.__name__
        cls.status = status or cls.status


class InvalidRequest(RequestError):
    """The request itself is wrong; asking again the same way cannot help."""


class FutureCursor(RequestError):
    """The cursor lies beyond the newest seq that the database knows."""


class AuthRequired(RequestError, status=401):
    """No token, or one that nobody here knows (RFC 6750, section 3)."""

    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer realm="sse-labels"'}


class Forbidden(RequestError, status=403):
    """The token is known, the right is missing."""


class NoSuchStream(RequestError, status=404):
    """No stream of this id is open, or no longer."""


class PayloadTooLarge(RequestError, status=413):
    """The body is over the limit."""


class UnsupportedMediaType(RequestError, status=415):
    """The body's coding is none that is decoded here (RFC 9110, section 15.5.16)."""

    headers: Mapping[str, str] = {"Accept-Encoding": "gzip, deflate"}


class UpgradeRequired(RequestError, status=426):
    """A WebSocket handshake of a version that is not spoken here (RFC 6455, section 4.4)."""

    headers: Mapping[str, str] = {
        "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
    }  # fmt: skip


class InvalidLabel(RequestError, status=422):
    """A label breaks the lexicon; the message names its index in the request and the field."""

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
    """An Idempotency-Key came back with other labels (draft-ietf-httpapi-idempotency-key)."""


class LabelsRefused(RequestError, status=422):
    """The database does not take these labels: a constraint or a trigger of its own says no."""


class EpochChanged(RequestError, status=409):
    """The cursor is from another life of the database: its seqs name other labels now."""


class TooManyConnections(RequestError, status=503):
    """The server holds as many streams as it may."""


class RequestTimeout(RequestError, status=408):
    """The request did not become whole in time (RFC 9110, section 15.5.9)."""

    # What is left of the body is not waited for, so the connection cannot be used again.
    headers: Mapping[str, str] = {"Connection": "close"}


class HeadTooLarge(RequestError, status=431):
    """The request's head is over the limit (RFC 6585, section 5)."""


class ComeBackLater(RequestError, status=429):
    """Too much from one client (RFC 6585, section 4); `Retry-After` says when to come back."""

    def __init__(self, message: str, after_seconds: float) -> None:
        super().__init__(message)
        #: Whole seconds, rounded up, at least 1 (RFC 9110, section 10.2.3).
        self.after_seconds = max(1, math.ceil(after_seconds))
        self.headers = {"Retry-After": str(self.after_seconds)}


class TooManyFromAddress(ComeBackLater):
    """One address holds as many streams or connections as it may."""


class RateLimited(ComeBackLater):
    """A publisher is over its rate; nothing was stored."""


class NotReady(RequestError, status=503):
    """The database is away or the sequencer has no head yet; try again soon."""


class StreamClosed(SseLabelsError):
    """A stream ends; `name` and the message become its last event."""

    name: str

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__


class ConsumerTooSlow(StreamClosed):
    """More events waited for the consumer than its outbox may hold."""


class TokenExpired(StreamClosed):
    """The token that opened the stream is no longer valid."""


class StreamCut(StreamClosed):
    """An operator ended this stream."""


class HistoryRefused(StreamClosed):
    """The database does not let this server read what the consumer is to get."""

    def __init__(
        self,
        message: str = "the database does not let this server read on; its operator can see why "
        "in its log",
    ) -> None:
        super().__init__(message)


class ServerStopping(StreamClosed):
    """The server shuts down; reconnecting with the last id loses nothing."""
