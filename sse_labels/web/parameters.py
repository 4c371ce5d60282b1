"""What a request asks for: its cursor, its filter, and more than events.

Promises: either a value that can be used as it is, or an `InvalidRequest` that
names the parameter, what stood there and what was expected. Nothing is guessed.
Stands at the edge of the corridor, before the status line is sent.
Does not belong here: whether the cursor exists (that needs the database).
"""

from __future__ import annotations

from math import inf

from aiohttp import web

from sse_labels.errors import InvalidRequest
from sse_labels.filters import Filter, parse_filter
from sse_labels.labels import expires_at, is_datetime, shown
from sse_labels.seq import number_in

LAST_EVENT_ID = "Last-Event-ID"
#: How far a client's clock may be ahead: it asks for what expires after its own now.
AHEAD_SECONDS = 10.0


def parse_cursor(text: str, name: str) -> int:
    """Return a cursor written as a decimal integer, 0 … 2^63-1."""
    number = number_in(text)
    if number is None:
        raise InvalidRequest(f"{name}: got {text[:60]!r}, expected a decimal integer 0 … 2^63-1")
    return number


def stream_cursor(request: web.Request) -> int | None:
    """Return where the stream starts: the header, else the query, else None for live only.

    The header wins: a browser that reconnects sends the URL's old `cursor` as well.
    """
    header = _single(request.headers.getall(LAST_EVENT_ID, []), LAST_EVENT_ID)
    query = _single(request.query.getall("cursor", []), "cursor")
    from_query = None if query is None else parse_cursor(query, "cursor")
    return from_query if header is None else parse_cursor(header, LAST_EVENT_ID)


def request_filter(request: web.Request) -> Filter | None:
    """Return the filter of `sources`, `uriPatterns` and `values`, each as often as one likes."""
    query = request.query
    return parse_filter(
        query.getall("sources", []), query.getall("uriPatterns", []), query.getall("values", [])
    )


def wants_state(request: web.Request) -> bool:
    """Return whether `snapshot=active` asks for what is in force, and not for all events."""
    text = _single(request.query.getall("snapshot", []), "snapshot")
    if text not in (None, "active"):
        raise InvalidRequest(f"snapshot: got {text[:60]!r}, expected 'active'")
    return text is not None


def expired_since(request: web.Request, now: float) -> float | None:
    """Return after what time to tell of expiries, in seconds since 1970; None: not asked for.

    Infinity for `expired=live`: what expires from whenever the stream begins.
    """
    text = _single(request.query.getall("expired", []), "expired")
    if text is None:
        return None
    if text == "live":
        return inf
    since = expires_at(text) if is_datetime(text) else None
    if since is None:
        raise InvalidRequest(
            f"expired: got {shown(text)}, expected 'live' or a datetime such as "
            "'2024-05-01T12:00:00.000Z' (in a URL a + is written %2B)"
        )
    if since > now + AHEAD_SECONDS:
        raise InvalidRequest(f"expired: got {shown(text)}, expected a time that is not to come")
    return since


def whole_number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """Return an integer parameter within its bounds."""
    text = _single(request.query.getall(name, []), name)
    if text is None:
        return default
    number = number_in(text, low, high)
    if number is None:
        raise InvalidRequest(f"{name}: got {text[:60]!r}, expected an integer {low} … {high}")
    return number


def _single(given: list[str], name: str) -> str | None:
    if len(given) > 1:
        raise InvalidRequest(f"{name}: given {len(given)} times, expected once")
    return given[0] if given else None
