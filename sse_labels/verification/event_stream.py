"""Opening an event stream of ours.

Promises: what is no stream, and what ends one, is Refused or Lost, in one line.
Stands before the readings (`first_reading`, `second_reading`).
Does not belong here: what is right and wrong; parsing event streams (`client`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from sse_labels.client.event_reader import HEADERS
from sse_labels.client.event_stream import EventStream, MessageTooLong, is_event_stream
from sse_labels.client.retries import TOKEN_HINT
from sse_labels.seq import number_in, seconds_in
from sse_labels.verification.continuity import object_in, words_of
from sse_labels.verification.patience import (
    FINAL_ERRORS,
    TEMPORARY,
    Lost,
    Refused,
    Unavailable,
)

#: Of an answer that is no stream this much is read, to see what it says.
REFUSAL_MAX_BYTES = 64 * 1024
#: No hint of a server is followed longer than this.
HINT_MAX_SECONDS = 3600.0


class Opened(NamedTuple):
    """One answer that is a stream."""

    #: The newest seq when it began, None when the server does not say.
    head: int | None
    epoch: str
    events: EventStream


class EventStreams:
    """Opens the stream at one address, as often as one likes."""

    def __init__(self, client: httpx.Client, url: httpx.URL) -> None:
        self._client = client
        self._url = url
        self.place = place_of(url)

    @contextmanager
    def open(self, cursor: int, **filters: str) -> Iterator[Opened]:
        """Stream what comes after `cursor`; `filters` stand for those of the address.

        Raises Lost, also from within the block, or Refused.
        """
        url = self._url
        for name, value in filters.items():
            url = url.copy_set_param(name, value)
        headers = HEADERS | {"Last-Event-ID": str(cursor)}
        try:
            with self._client.stream("GET", url, headers=headers) as answer:
                if answer.status_code != 200:
                    raise refusal(self.place, answer)
                told = answer.headers
                kind = told.get("Content-Type", "nothing")
                if not is_event_stream(kind):
                    raise Refused(f"{self.place} is no event stream: it answers with {kind[:60]!r}")
                yield Opened(
                    number_in(told.get("Sse-Labels-Head", "")),
                    told.get("Sse-Labels-Epoch", ""),
                    EventStream(answer.iter_bytes()),
                )
        except MessageTooLong as error:
            raise Refused(f"{self.place} sends {error}") from None
        except httpx.TransportError as error:
            raise Lost(str(error) or type(error).__name__) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise Refused(f"{self.place}: {str(error) or type(error).__name__}") from None


def ended(data: str) -> Refused | Unavailable:
    """Return what the `error` event that ends a stream means."""
    said = object_in(data) or {}
    text = f"the server ended the stream: {words_of(said.get('error'), said.get('message'))}"
    return Refused(text) if said.get("error") in FINAL_ERRORS else Unavailable(text)


def refusal(place: str, response: httpx.Response) -> Refused | Unavailable:
    """Return what an answer other than the one hoped for means."""
    text = f"{place} answered {response.status_code}, {said_in(response)}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        text += f" ({TOKEN_HINT})"
    if response.status_code not in TEMPORARY:
        return Refused(text)
    seconds = seconds_in(response.headers.get("Retry-After", "")) or 0
    return Unavailable(text, min(seconds, HINT_MAX_SECONDS))


def said_in(response: httpx.Response) -> str:
    """Return what an answer says about itself, reading no more of it than a few pages."""
    body = b""
    for part in response.iter_bytes():
        body += part
        if len(body) > REFUSAL_MAX_BYTES:
            break
    said = object_in(body.decode("utf-8", "replace"))
    if said is None or "error" not in said:
        return words_of(response.reason_phrase, None)
    return words_of(said["error"], said.get("message"))


def place_of(url: httpx.URL) -> str:
    """Return an address as messages name it: a token may stand in its query, a password before."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))
