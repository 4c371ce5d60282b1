"""`sse-labels tail URL`: the stream as lines of JSON, across reconnects and runs.

Promises: every event once and in order, one JSON object per line; the state
file never claims more than what was written out; a wrong request ends it, a
lost connection does not.
Does not belong here: parsing event streams (httpx-sse does).
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import httpx
import ujson
from httpx_sse import EventSource, ServerSentEvent, SSEError, connect_sse

from sse_labels.backoff import Backoff
from sse_labels.cli.options import option, switch
from sse_labels.config import integer, path
from sse_labels.errors import ConfigError, SseLabelsError

#: The server writes at least a heartbeat each 15 s; after this silence the connection is dead.
SILENCE_SECONDS = 45.0
CONNECT_SECONDS = 10.0
#: Answers after which asking again the same way may help.
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}
#: Digits of the largest seq, 2^63-1: the state file has one length for ever.
STATE_DIGITS = 19


class Refused(SseLabelsError):
    """The server will never answer this request with a stream."""


class State:
    """The cursor in a file: one number, written in place so that it is never half of one."""

    def __init__(self, file: Path) -> None:
        """Open and lock `file`; raise ConfigError when it cannot be, or holds something else."""
        self._file = file
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("--state", str(file), "a file that no other tail uses") from None
        except OSError as error:
            raise ConfigError(
                "--state", str(file), f"a file to write to ({error.strerror})"
            ) from None

    def load(self) -> int | None:
        """Return the cursor, None when the file is new."""
        text = os.pread(self._descriptor, 64, 0).strip()
        if not text:
            return None
        if text.isdigit() and len(text) <= STATE_DIGITS:
            return int(text)
        raise ConfigError("--state", str(self._file), "a file with a cursor in it, or a new one")

    def save(self, cursor: int) -> None:
        """Remember `cursor`; called after the event was written out."""
        os.pwrite(self._descriptor, b"%0*d\n" % (STATE_DIGITS, cursor), 0)


class Tail:
    """Follows one URL and writes what it receives to standard output."""

    def __init__(self, url: str, cursor: int | None, state: State | None, until_head: bool) -> None:
        self._url = url
        self._cursor = cursor
        self._state = state
        self._until_head = until_head
        self._head: int | None = None
        self._retry_seconds = 0.0
        self._backoff = Backoff(first=0.5, longest=30.0)

    def run(self) -> None:
        """Follow for ever, or until the head that the server had at the beginning."""
        timeout = httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
        with httpx.Client(timeout=timeout) as client:
            while True:
                try:
                    if self._follow(client):
                        return
                    problem = "the stream ended"
                except (httpx.TransportError, SSEError) as error:
                    problem = str(error) or type(error).__name__
                wait = self._retry_seconds or self._backoff.next()
                self._retry_seconds = 0.0
                say(f"{problem}; reconnecting in {wait:.1f} s from cursor {self._cursor}")
                time.sleep(wait)

    def _follow(self, client: httpx.Client) -> bool:
        """Read one response; return whether the end that was asked for is reached."""
        headers = {} if self._cursor is None else {"Last-Event-ID": str(self._cursor)}
        with connect_sse(client, "GET", self._url, headers=headers) as source:
            if source.response.status_code != 200:
                self._refused(source.response)
                return False
            if self._head is None and self._until_head:
                self._head = head_of(source.response.headers)
            return self._read(source)

    def _read(self, source: EventSource) -> bool:
        for event in source.iter_sse():
            if event.retry is not None:
                self._retry_seconds = event.retry / 1000
            if event.event == "error":
                say(f"the server ended the stream: {event.data}")
                return False
            if event.event == "info":
                say(f"news: {event.data}")
            elif event.event == "message":
                self._take(event)
                if self._head is not None and (self._cursor or 0) >= self._head:
                    return True
        return False

    def _take(self, event: ServerSentEvent) -> None:
        """Write a label out, and only then move on; an id-only block just moves on."""
        if event.data:
            sys.stdout.write(event.data + "\n")
            sys.stdout.flush()
            self._backoff.reset()
        if event.id:
            self._cursor = int(event.id)
            if self._state is not None:
                self._state.save(self._cursor)

    def _refused(self, response: httpx.Response) -> None:
        response.read()
        try:
            problem = ujson.loads(response.text)
            text = f"{problem['error']}: {problem['message']}"
        except (ValueError, TypeError, KeyError):
            text = response.reason_phrase
        text = f"{self._url} answered {response.status_code}, {text}"
        if response.status_code not in TEMPORARY:
            raise Refused(text)
        say(text)
        after = response.headers.get("Retry-After", "")
        self._retry_seconds = float(after) if after.isdigit() else 0.0


def head_of(headers: Mapping[str, Any]) -> int:
    """Return the server's head when the stream began."""
    value = headers.get("Sse-Labels-Head", "")
    if not value.isdigit():
        raise Refused("--until-head: this server does not tell its head (no Sse-Labels-Head)")
    return int(value)


def say(text: str) -> None:
    """Tell the person at the terminal; standard output is for events alone."""
    click.echo(f"sse-labels tail: {text}", err=True)


@click.command()
@click.argument("url", envvar="SSE_LABELS_URL")
@option("cursor", integer(0, 2**63 - 1), "Start after this seq; 0: everything.", metavar="N")
@option(
    "state", path, "File that keeps the cursor across runs; it wins over --cursor.", metavar="FILE"
)
@switch("until_head", "End when the newest label of the moment it started has been read.")
def tail(url: str, cursor: int | None, state: Path | None, until_head: bool) -> None:
    """Write the events of the stream at URL as lines of JSON.

    URL is the stream's, e.g. http://127.0.0.1:8080/stream, filters included. A
    lost connection is made anew from the last event, with growing pauses.
    """
    kept = None if state is None else State(state)
    known = None if kept is None else kept.load()
    try:
        Tail(url, cursor if known is None else known, kept, until_head).run()
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigError("URL", url, f"the address of a stream ({error})") from None
