"""Turns a server's answers, and the errors that end streams, into exceptions with a message.

Promises: any text of a server becomes one printable line of bounded length.
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

#: How much of an unexpected answer is read for its message.
REFUSAL_MAX_BYTES = 64 * 1024
#: The most characters of a server's text in general, and in an error's name or message.
WORDS_MAX = 200
ERROR_MAX = 1000


def object_in(data: str) -> dict[str, Any] | None:
    """Return the JSON object in `data`. None: `data` is not one."""
    try:
        found = ujson.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def words(said: object, most: int = WORDS_MAX) -> str:
    """Return a server's text as one line that any terminal can show. Empty for None."""
    text = said[:most] if isinstance(said, str) else "" if said is None else shown(said)
    return "".join(char if char.isprintable() else "?" for char in text)


def words_in(data: str, otherwise: str) -> str:
    """Return the name and the message of an error in JSON, or else `otherwise`."""
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
    """Return the exception for an unexpected answer. Reads the answer's body."""
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
    """Return the exception for the `error` event at the end of a stream."""
    name = (object_in(data) or {}).get("error")
    text = f"the server ended the stream: {words_in(data, data)}"
    return Refused(text) if name in BEGAN_ANEW else Unavailable(text)


def place_of(url: httpx.URL) -> str:
    """Return an address for messages, without its query and user info: these may be secret."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))
