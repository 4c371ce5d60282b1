"""Reads the event stream at one address, and reconnects when a connection is lost.

Promises: a new connection continues after the cursor. An address without a stream, or a stream
that cannot continue, raises Refused with a message of one line.
Does not belong here: the meaning of the blocks, and which blocks move the cursor.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from sse_labels.client.answers import asking, ended, place_of, refusal
from sse_labels.client.event_stream import Block, EventStream, MessageTooLong, is_event_stream
from sse_labels.client.retries import CONNECT_SECONDS, Lost, Refused, Retries, Unavailable
from sse_labels.protocol.seq import number_in

#: The server writes a heartbeat at least every 15 s. After this silence the connection is dead.
SILENCE_SECONDS = 45.0
#: The headers of an `EventSource`.
HEADERS = {"Accept": "text/event-stream", "Cache-Control": "no-store"}


def client_of(token: str | None, tls: ssl.SSLContext) -> httpx.Client:
    """Return the HTTP client for all connections."""
    return httpx.Client(
        timeout=httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS),
        follow_redirects=True,
        verify=tls,
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
    )


class Opened(NamedTuple):
    """A connection has begun to stream."""

    #: The newest seq at the begin. None: the server does not send it.
    head: int | None
    epoch: str


class EventReader:
    """Yields the blocks of the stream. The caller moves `cursor`."""

    def __init__(
        self,
        client: httpx.Client,
        url: httpx.URL,
        cursor: int | None,
        retries: Retries,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`cursor` None means live only. `say` gets a line when a connection is lost."""
        self._client = client
        self._url = url
        self.place = place_of(url)
        #: The next connection starts after this seq.
        self.cursor = cursor
        self._retries = retries
        self._say = say
        #: Whether any connection has opened a stream.
        self.reached = False

    def __iter__(self) -> Generator[Opened | Block, None, None]:
        """Yield each connection as it opens, and then its blocks. Raises Refused."""
        while True:
            try:
                with self._open() as answer:
                    yield from self._blocks(answer)
                lost = Lost("the stream ended")
            except Lost as error:
                lost = error
                is_wrong = not self.reached and not isinstance(lost, Unavailable)
                if is_wrong and self._retries.retry_seconds is not None:
                    # Waiting does not fix a wrong address.
                    raise Refused(f"{self.place}: {lost}") from None
            wait = self._retries.wait_seconds(lost)
            where = "from now" if self.cursor is None else f"after seq {self.cursor}"
            self._say(f"{lost}; reconnecting {where} in {wait:.1f} s")
            time.sleep(wait)

    @contextmanager
    def _open(self) -> Iterator[httpx.Response]:
        headers = dict(HEADERS)
        if self.cursor is not None:
            headers["Last-Event-ID"] = str(self.cursor)
        with (
            asking(self.place),
            self._client.stream("GET", self._url, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise refusal(self.place, answer)
            kind = answer.headers.get("Content-Type", "nothing")
            if not is_event_stream(kind):
                raise Refused(f"{self.place} is no event stream: it answers with {kind[:60]!r}")
            yield answer

    def _blocks(self, answer: httpx.Response) -> Iterator[Opened | Block]:
        stream = EventStream(answer.iter_bytes())
        opened = False
        try:
            for block in stream:
                if block.event == "error" and block.data is not None:
                    # A full server also answers with such an event, in place of a stream.
                    yield block
                    raise ended(block.data)
                if not opened:
                    opened = self.reached = True
                    self._retries.opened()
                    head = number_in(answer.headers.get("Sse-Labels-Head", ""))
                    yield Opened(head, answer.headers.get("Sse-Labels-Epoch", ""))
                before = self.cursor
                yield block
                if self.cursor != before:
                    self._retries.progress()
        except MessageTooLong as error:
            raise Refused(f"{self.place} sends {error}") from None
        finally:
            if stream.retry_seconds is not None:
                self._retries.hint_seconds = stream.retry_seconds
