"""What a server says in an answer, or at the end of a stream, and what that means.

Promises: whatever a server sent becomes one printable line of bounded length.
Does not belong here: when to ask again (`retries`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import ujson

from sse_labels.client.retries import (
    BEGAN_ANEW,
    TEMPORARY,
    TOKEN_HINT,
    Lost,
    Refused,
    Unavailable,
    after_seconds,
)
from sse_labels.protocol.formats import shown

#: Of an answer that is not the one hoped for this much is read, to see what it says.
REFUSAL_MAX_BYTES = 64 * 1024
#: Characters of a server's own words that are shown, and of what an error of it says.
WORDS_MAX = 200
ERROR_MAX = 1000


def object_in(data: str) -> dict[str, Any] | None:
    """Return the JSON object in `data`, None when there is none."""
    try:
        found = ujson.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def words(said: object, most: int = WORDS_MAX) -> str:
    """Return what a server said, in one line that any terminal can show; '' for nothing."""
    text = said[:most] if isinstance(said, str) else "" if said is None else shown(said)
    return "".join(char if char.isprintable() else "?" for char in text)


def words_in(data: str, otherwise: str) -> str:
    """Return the name and the message of an error in JSON."""
    said = object_in(data) or {}
    if said.get("error") is None:
        return words(otherwise)
    given = (said["error"], said.get("message"))
    return ": ".join(words(part, ERROR_MAX) for part in given if part is not None)


@contextmanager
def asking(place: str) -> Iterator[None]:
    """Raise Lost or Refused for the errors of httpx."""
    try:
        yield
    except httpx.TransportError as error:
        raise Lost(str(error) or type(error).__name__) from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise Refused(f"{place}: {str(error) or type(error).__name__}") from None


def refusal(place: str, answer: httpx.Response) -> Refused | Unavailable:
    """Return what an answer other than the one hoped for means; its body is read for it."""
    body = b""
    for part in answer.iter_bytes():
        body += part
        if len(body) > REFUSAL_MAX_BYTES:
            break
    said = words_in(body.decode("utf-8", "replace"), answer.reason_phrase)
    text = f"{place} answered {answer.status_code}, {said}"
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        text += f" ({TOKEN_HINT})"
    if answer.status_code not in TEMPORARY:
        return Refused(text)
    return Unavailable(text, after_seconds=after_seconds(answer.headers))


def ended(data: str) -> Refused | Unavailable:
    """Return what the `error` event means that a stream ended with."""
    name = (object_in(data) or {}).get("error")
    text = f"the server ended the stream: {words_in(data, data)}"
    return Refused(text) if name in BEGAN_ANEW else Unavailable(text)


def place_of(url: httpx.URL) -> str:
    """Return an address as messages name it: a token may stand in its query, a password before."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))
