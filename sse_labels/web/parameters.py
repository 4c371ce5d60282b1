"""Parses the parameters of a request: cursor, filter, snapshot and expiries.

Promises: each function returns a usable value, or raises an `InvalidRequest` that names the
parameter, its value and what was expected. A parameter that is almost a known one is refused:
if the server ignored the parameter, it would stream other labels than the client wants.
Does not belong here: whether the cursor exists (only the database knows).
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from math import inf
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qs, unquote_to_bytes

from aiohttp import web

from sse_labels.errors import InvalidRequest
from sse_labels.protocol.filters import Filter, parse_filter
from sse_labels.protocol.formats import expires_at, is_datetime, shown
from sse_labels.protocol.seq import number_in

#: A head, or None while the head is not known.
H = TypeVar("H", int, int | None)

LAST_EVENT_ID = "Last-Event-ID"
#: The same in the query, for EventSource polyfills that cannot send the header.
LAST_EVENT_ID_PARAMETER = "lastEventId"
_FILTER = ("sources", "uriPatterns", "values", "access_token")
STREAM_PARAMETERS = (
    "cursor", LAST_EVENT_ID_PARAMETER, "epoch", "snapshot", "expired", *_FILTER,
)  # fmt: skip
QUERY_PARAMETERS = ("cursor", "limit", "snapshot", *_FILTER)
STREAMS_PARAMETERS = ("peer", "sort", "limit")
#: Names of a label's fields, which clients confuse with the filters for these fields.
_FIELDS = {"src": "sources", "uri": "uriPatterns", "uris": "uriPatterns", "val": "values"}
#: A name counts as a misspelled one from this similarity (`difflib`) and within this difference
#: in length: `curser` is `cursor` (0.83), and `utm_source` is not `sources`.
_ALIKE = 0.8
_LENGTHS_APART = 2
#: The most unknown parameters that are compared. A URL can hold 1,500, which would take 50 ms.
COMPARED_MAX = 32
#: How far a client's clock may be ahead. A client may ask for expiries after its own current time.
AHEAD_SECONDS = 10.0


class Asked(NamedTuple):
    """The parameters of a request for a stream."""

    #: Where the stream starts. None: live only.
    cursor: int | None
    #: Whether the stream begins with the labels in force.
    state: bool
    #: The stream reports labels that expire after this time, in seconds since 1970. None: it
    #: reports no expiries.
    expired_since: float | None
    filter: Filter | None
    epoch: str | None

    def position(self, head: H) -> int | H:
        """Return where the stream starts when the head is `head`."""
        return position_of(self.cursor, head, state=self.state)


def stream_asked(request: web.Request, now: float) -> Asked:
    """Return the parameters of a request at the time `now`. Raises InvalidRequest."""
    check_parameters(request, STREAM_PARAMETERS)
    return Asked(
        stream_cursor(request),
        wants_state(request),
        expired_since(request, now),
        request_filter(request),
        request.query.get("epoch"),
    )


def parse_cursor(text: str, name: str) -> int:
    """Return a cursor from a decimal integer, 0 … 2^63-1. Raises InvalidRequest."""
    number = number_in(text)
    if number is None:
        raise InvalidRequest(f"{name}: got {text[:60]!r}, expected a decimal integer 0 … 2^63-1")
    return number


def check_parameters(request: web.Request, known: tuple[str, ...]) -> None:
    """Raise InvalidRequest when the name of a parameter is almost one of `known`.

    A clearly different name is ignored, such as `_=1700000000` against caches.
    """
    unknown = (name for name in request.query if name not in known)
    for name in islice(unknown, COMPARED_MAX):
        if (meant := _meant(name[:60], known)) is not None:
            raise InvalidRequest(f"unknown parameter {name[:60]!r}, expected {meant!r}")


@lru_cache(1024)
def _meant(name: str, known: tuple[str, ...]) -> str | None:
    """Return the known parameter that `name` most likely means."""
    folded = {_folded(each): each for each in known}
    folded |= {field: meant for field, meant in _FIELDS.items() if meant in known}
    short = _folded(name)
    near = [each for each in folded if abs(len(each) - len(short)) <= _LENGTHS_APART]
    # Names of two or three letters are similar to too many others.
    cutoff = _ALIKE if len(short) > 3 else 1.0
    found = get_close_matches(short, near, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def check_encoding(request: web.Request) -> None:
    """Raise InvalidRequest when a percent-encoding in the URL is not UTF-8.

    A lenient parser would read `caf%E9` as a value that no label has, and nothing would match.
    """
    raw = request.raw_path
    if "%" not in raw and raw.isascii():
        return
    try:
        for part in raw.split("%")[1:]:
            bytes.fromhex(part[:2].ljust(2, "-"))
        unquote_to_bytes(raw).decode()
    except ValueError:
        raise InvalidRequest("the URL's percent-encoding is not UTF-8 (RFC 3986)") from None


def stream_cursor(request: web.Request) -> int | None:
    """Return where the stream starts. None: live only.

    A reconnecting client sends its last id and also the `cursor` of its URL. The last id (from the
    header, else from `lastEventId`) wins.
    """
    query = request.query
    return _cursor_in(
        request.headers.getall(LAST_EVENT_ID, []),
        query.getall(LAST_EVENT_ID_PARAMETER, []),
        query.getall("cursor", []),
    )


def _cursor_in(
    header: Sequence[str], parameter: Sequence[str], cursor: Sequence[str]
) -> int | None:
    found: int | None = None
    for given, name in (
        (cursor, "cursor"), (parameter, LAST_EVENT_ID_PARAMETER), (header, LAST_EVENT_ID),
    ):  # fmt: skip
        text = _single(given, name)
        if text is not None:
            found = parse_cursor(text, name)
    return found


def position_asked(asked: bytes, head: int | None) -> int | None:
    """Return the position of a refused client from the bytes of its request.

    A client without a cursor gets `head`. None: the cursor is unreadable, or the head not known.
    """
    lines = asked.split(b"\r\n\r\n", 1)[0].decode("latin-1").split("\r\n")
    target = lines[0].partition(" ")[2].partition(" ")[0]
    query = parse_qs(target.partition("?")[2], keep_blank_values=True)
    fields = (line.partition(":") for line in lines[1:])
    header = [value.strip() for name, _, value in fields if name.lower() == LAST_EVENT_ID.lower()]
    try:
        cursor = _cursor_in(header, query.get(LAST_EVENT_ID_PARAMETER, []), query.get("cursor", []))
    except InvalidRequest:
        return None
    return position_of(cursor, head, state="snapshot" in query)


def position_of(cursor: int | None, head: H, *, state: bool) -> int | H:
    """Return the position of a client before its stream opens. None: not known."""
    if cursor is not None:
        return cursor
    # The client has not received any part of the state.
    return 0 if state else head


def request_filter(request: web.Request) -> Filter | None:
    """Return the filter of `sources`, `uriPatterns` and `values`. Each may be repeated."""
    query = request.query
    return parse_filter(
        query.getall("sources", []), query.getall("uriPatterns", []), query.getall("values", [])
    )


def wants_state(request: web.Request) -> bool:
    """Return whether `snapshot=active` asks for the labels in force, in place of all events."""
    text = _single(request.query.getall("snapshot", []), "snapshot")
    if text not in (None, "active"):
        raise InvalidRequest(f"snapshot: got {text[:60]!r}, expected 'active'")
    return text is not None


def expired_since(request: web.Request, now: float) -> float | None:
    """Return the time after which expiries are reported, in seconds since 1970. None: not at all.

    Infinity stands for `expired=live`: expiries after the stream's begin are reported.
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
        raise InvalidRequest(f"expired: got {shown(text)}, expected a time in the past")
    return since


def whole_number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """Return an integer parameter within its bounds. Raises InvalidRequest."""
    text = _single(request.query.getall(name, []), name)
    if text is None:
        return default
    number = number_in(text, low, high)
    if number is None:
        raise InvalidRequest(f"{name}: got {text[:60]!r}, expected an integer {low} … {high}")
    return number


def _single(given: Sequence[str], name: str) -> str | None:
    if len(given) > 1:
        raise InvalidRequest(f"{name}: given {len(given)} times, expected once")
    return given[0] if given else None
