"""`sse-labels tail URL`: writes the stream as lines of JSON, across reconnects and runs.

Promises: every event is written once and in order, one JSON object per line. With a state file this
holds over all runs that end in order (Ctrl-C, SIGTERM, --until-head). After a SIGKILL nothing is
lost, and the next run may repeat one event: the event that was written out and not yet noted. A
wrong request ends the command. After a lost connection it reconnects.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import ssl
import sys
from pathlib import Path
from types import FrameType

import click
import httpx

from sse_labels.cli.layout import Command
from sse_labels.cli.options import (
    named_as_given,
    option,
    server_url,
    switch,
    token_option,
    url_argument,
)
from sse_labels.cli.standard_streams import OutputLost
from sse_labels.cli.state import CursorFile
from sse_labels.cli.tls import tls_options
from sse_labels.client.event_reader import EventReader, Opened, client_of
from sse_labels.client.event_stream import Block
from sse_labels.client.retries import Refused, Retries
from sse_labels.protocol.seq import SEQ_MAX, number_in
from sse_labels.setting_parsers import Expected, integer, path


class Tail:
    """Follows one URL and writes what it receives to standard output."""

    def __init__(self, reader: EventReader, state: CursorFile | None, until_head: bool) -> None:
        self._reader = reader
        self._state = state
        self._until_head = until_head
        self._head: int | None = None
        self._writing = False
        self._stop_signal = 0

    def run(self) -> None:
        """Follow forever, or until the head that the server had at the beginning."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        for block in self._reader:
            if isinstance(block, Opened):
                if self._until_head and self._head is None:
                    self._head = block.head
                    if self._head is None:
                        raise Refused("--until-head: this server does not tell its head")
            elif block.event == "error" and block.data is not None:
                if self._reader.cursor is None:
                    # A full server gives its head: events after it must not be missed.
                    seq = self._seq_of(block, is_label=False)
                    if seq is not None:
                        self._move_to(seq)
            else:
                self._take(block)
                if self._head is not None and (self._reader.cursor or 0) >= self._head:
                    return

    def _take(self, event: Block) -> None:
        """Write the label of a block, if it has one; after that move the cursor."""
        label = event.data if event.event == "message" else None
        cursor = self._seq_of(event, is_label=bool(label))
        self._writing = True
        if label:
            sys.stdout.write(label + "\n")
            sys.stdout.flush()
        elif (
            event.event == "info"
            and event.data
            and not any(name in event.data for name in ("StreamOpened", "CaughtUp"))
        ):
            say(f"news: {event.data}")
        elif not output_is_read():
            raise OutputLost(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
        if cursor is not None and cursor != self._reader.cursor:
            self._move_to(cursor)
        self._writing = False
        if self._stop_signal:
            self._stop(self._stop_signal, None)

    def _move_to(self, cursor: int) -> None:
        self._reader.cursor = cursor
        if self._state is not None:
            self._state.save(cursor)

    def _seq_of(self, event: Block, *, is_label: bool) -> int | None:
        """Return the seq of the event; raise Refused when it is not above the one before."""
        if not event.id:
            return None
        seq = number_in(event.id)
        if seq is None:
            place = self._reader.place
            raise Refused(f"{place} is no stream of labels: event id {event.id[:60]!r}")
        cursor = self._reader.cursor
        if cursor is not None and seq < cursor + is_label:
            raise Refused(f"the server went back: seq {seq} came after {cursor}")
        return seq

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """End, but not between writing an event and noting it. A second signal ends at once."""
        if self._writing and not self._stop_signal:
            self._stop_signal = number
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        # The parent process must see the same end as without this handler.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def output_is_read() -> bool:
    """Return whether the pipe of standard output still has a reader.

    Called when there is nothing to write. Without it `tail … | head -1` would end only with the
    next label.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(seen & select.POLLERR for _, seen in poll.poll(0))


def say(text: str) -> None:
    """Write a message to standard error; standard output is for events only."""
    click.echo(f"sse-labels tail: {text}", err=True)


def stream_url(given: str) -> str:
    """Return the stream's URL; an address without a path gets `/stream`."""
    try:
        parts = httpx.URL(server_url(given))
    except httpx.InvalidURL:
        raise Expected("an address such as http://127.0.0.1:8080") from None
    return str(parts.copy_with(path="/stream")) if parts.path in ("", "/") else str(parts)


@click.command(cls=Command)
@url_argument(stream_url, "http://127.0.0.1:8080/stream")
@option("cursor", integer(0, SEQ_MAX), "Start after this seq; 0: everything.",
        metavar="SEQ", shown_default="none, only new labels")  # fmt: skip
@option(
    "state", path, "File that keeps the cursor across runs; --cursor is for the first run only.",
    metavar="FILE",
)  # fmt: skip
@token_option
@switch("until_head", "End after the label that was the newest when the command started.")
@tls_options
def tail(
    url: str, cursor: int | None, state: Path | None, token: str | None, until_head: bool,
    tls: ssl.SSLContext,
) -> None:  # fmt: skip
    """Write the labels of the stream at URL, one JSON object per line.

    URL is the address of a server, or of its stream with filters. It is also
    SSE_LABELS_URL. The default is http://127.0.0.1:8080/stream.

    After a lost connection it reconnects with growing pauses, and continues after
    the last label. With --state, a run continues after the last run: each label is
    written once, and none is left out. Only after a SIGKILL the last label may be
    written again.

    \b
    All spam labels so far:
      sse-labels tail --cursor 0 --until-head \\
        'http://127.0.0.1:8080/stream?values=spam'
    """
    with named_as_given():
        kept = None if state is None else CursorFile(state)
        known = None if kept is None else kept.load()
    with client_of(token, tls) as client:
        after = cursor if known is None else known
        reader = EventReader(client, httpx.URL(url), after, Retries(None), say)
        Tail(reader, kept, until_head).run()
