"""What a request asks for: its cursor, its filter, and more than events.

Promises: either a value that can be used as it is, or an `InvalidRequest` that
names the parameter, what stood there and what was expected. Nothing is guessed:
a parameter that is almost a known one is refused, because ignoring it would stream
other labels than the ones asked for.
Does not belong here: whether the cursor exists (that needs the database).
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

#: A head, or None while it is not known.
H = TypeVar("H", int, int | None)

LAST_EVENT_ID = "Last-Event-ID"
#: The same in the query: how EventSource polyfills that cannot send the header come back.
LAST_EVENT_ID_PARAMETER = "lastEventId"
_FILTER = ("sources", "uriPatterns", "values", "access_token")
STREAM_PARAMETERS = (
    "cursor", LAST_EVENT_ID_PARAMETER, "epoch", "snapshot", "expired", *_FILTER,
)  # fmt: skip
QUERY_PARAMETERS = ("cursor", "limit", "snapshot", *_FILTER)
STREAMS_PARAMETERS = ("peer", "sort", "limit")
#: Names of a label's fields, which are easily taken for the filters of them.
_FIELDS = {"src": "sources", "uri": "uriPatterns", "uris": "uriPatterns", "val": "values"}
#: How alike two names are (`difflib`), and how far apart in length, for one to be meant: `curser`
#: is `cursor` (0.83), `utm_source` is not `sources`.
_ALIKE = 0.8
_LENGTHS_APART = 2
#: Unknown parameters that are compared: a URL holds 1,500, which would take 50 ms.
COMPARED_MAX = 32
#: How far a client's clock may be ahead: it asks for what expires after its own now.
AHEAD_SECONDS = 10.0


class Asked(NamedTuple):
    """What a request for a stream asks for."""

    #: Where the stream starts; None: live only.
    cursor: int | None
    #: Whether what is in force comes first.
    state: bool
    #: After what time to tell of expiries, in seconds since 1970; None: not asked for.
    expired_since: float | None
    filter: Filter | None
    epoch: str | None

    def position(self, head: H) -> int | H:
        """Return where the stream starts while the head is `head`."""
        return position_of(self.cursor, head, state=self.state)


def stream_asked(request: web.Request, now: float) -> Asked:
    """Return what a request for a stream asks for at the time `now`; raise InvalidRequest."""
    check_parameters(request, STREAM_PARAMETERS)
    return Asked(
        stream_cursor(request),
        wants_state(request),
        expired_since(request, now),
        request_filter(request),
        request.query.get("epoch"),
    )


def parse_cursor(text: str, name: str) -> int:
    """Return a cursor written as a decimal integer, 0 … 2^63-1."""
    number = number_in(text)
    if number is None:
        raise InvalidRequest(f"{name}: got {text[:60]!r}, expected a decimal integer 0 … 2^63-1")
    return number


def check_parameters(request: web.Request, known: tuple[str, ...]) -> None:
    """Raise InvalidRequest when a parameter is almost one of `known`.

    What is plainly something else (`_=1700000000`, to keep caches out) is ignored.
    """
    unknown = (name for name in request.query if name not in known)
    for name in islice(unknown, COMPARED_MAX):
        if (meant := _meant(name[:60], known)) is not None:
            raise InvalidRequest(f"unknown parameter {name[:60]!r}, expected {meant!r}")


@lru_cache(1024)
def _meant(name: str, known: tuple[str, ...]) -> str | None:
    """Return which of the known parameters `name` is most likely meant for."""
    folded = {_folded(each): each for each in known}
    folded |= {field: meant for field, meant in _FIELDS.items() if meant in known}
    short = _folded(name)
    near = [each for each in folded if abs(len(each) - len(short)) <= _LENGTHS_APART]
    # Of two or three letters any others would be alike.
    cutoff = _ALIKE if len(short) > 3 else 1.0
    found = get_close_matches(short, near, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def check_encoding(request: web.Request) -> None:
    """Raise InvalidRequest when the URL has a percent-encoding that stands for no text.

    Read leniently, `caf%E9` would be a value that no label has: nothing would ever match.
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
    """Return where the stream starts; None for live only.

    Where a client resumes (the header, else `lastEventId`) wins over the `cursor` of its URL: one
    that reconnects sends both.
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
    """Return the position of a client that is refused, from the bytes of its request.

    `head` for one that would have streamed from now on. None: it says none that can be read, or
    none is known.
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
    """Return where a client stands that has not been let in, or None when that is not known."""
    if cursor is not None:
        return cursor
    # Nothing of a state has been received yet.
    return 0 if state else head


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


def _single(given: Sequence[str], name: str) -> str | None:
    if len(given) > 1:
        raise InvalidRequest(f"{name}: given {len(given)} times, expected once")
    return given[0] if given else None
