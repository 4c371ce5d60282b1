"""`sse-labels publish [FILE|-]`: labels from lines of JSON.

Promises: lines go in by batches, in order; a batch is stored whole or not at
all, and it ends with a line's number when one is wrong; what was stored before
is said, so that one can go on from there. A batch that nobody answered for is
sent again under the same key, so a server that knows keys stores it once; what
stays uncertain is called so.
Does not belong here: reading lines (`lines`); what makes a label valid (the
server says).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import click
import httpx
import ujson

from sse_labels.backoff import Backoff
from sse_labels.cli.layout import Command
from sse_labels.cli.lines import Batch, NotJson, read_batches
from sse_labels.cli.options import (
    DEMO_FOLDER,
    option,
    server_url,
    shown_data_dir,
    token_text,
)
from sse_labels.cli.standard_streams import tell_result
from sse_labels.cli.tls import tls_options
from sse_labels.client.retries import after_seconds
from sse_labels.config import integer, path, seconds, size
from sse_labels.embedded import EmbeddedPostgres, default_data_dir
from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.publish_token import FILE_NAME, read_token
from sse_labels.seq import SEQ_MAX, number_in

TIMEOUT_SECONDS = 60.0
#: The server forgets a key after a day (`retention`); sent again later, a batch would be new.
RETRY_MAX_SECONDS = 43_200
RATE_LIMITED = 429
#: Answers after which the same request may be answered better.
TEMPORARY = {408, RATE_LIMITED, 502, 503, 504}
#: What to do about some answers.
HINTS = {
    401: " (give a token that may publish: --publish-token, or SSE_LABELS_PUBLISH_TOKEN)",
    413: " (a smaller --batch or --batch-bytes?)",
}
#: How the server names a label of a request.
_INDEX = re.compile(r"^labels\[([0-9]+)\](?:\.|: )?")
#: Failures before the request was on its way.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)


class NotPublished(SseLabelsError):
    """Something was not stored; the message says which line, and what was stored before."""


class Progress:
    """What has been stored so far."""

    def __init__(self, first_line: int) -> None:
        self._first_line = first_line
        self.labels = 0
        self.last_line = 0
        self.last_seq = 0
        #: The batch that may be stored, although nobody has said so.
        self.under_way: Batch | None = None

    def __str__(self) -> str:
        if not self.labels:
            return "nothing was stored before"
        return f"{counted(self.labels)} stored before, up to line {self.last_line}"

    @property
    def next_line(self) -> int:
        """Return the line to go on from."""
        return self.last_line + 1 if self.labels else self._first_line

    def stored(self, batch: Batch, seqs: list[int]) -> None:
        """Count a batch."""
        self.labels += len(seqs)
        self.last_line, self.last_seq = batch.numbers[-1], seqs[-1]
        self.under_way = None


class Trouble(NamedTuple):
    """Why a try did not end with its batch stored."""

    reason: str
    #: Whether nothing of the batch was stored by this try.
    certain: bool
    #: Whether the same request may be answered better.
    temporary: bool = False
    status: int | None = None
    #: How long the server asks to wait; 0 when it does not say.
    after_seconds: float = 0.0


class Sender:
    """Sends batches one after the other, each until its outcome is known.

    A batch is sent again until `retry_seconds` after its first failure; the last try still has
    its whole time-out.
    """

    def __init__(
        self, client: httpx.Client, url: str, progress: Progress, retry_seconds: float
    ) -> None:
        self._client = client
        self._url = url
        self._progress = progress
        self._retry_seconds = retry_seconds
        # Of this run alone: whoever publishes the same lines again wants them stored again.
        self._run = secrets.token_hex(16)
        self._batches = 0
        #: Whether a server was ever there: an address that is wrong does not mend by waiting.
        self._reached = False
        self._told_of_rate = False

    def send(self, batch: Batch) -> None:
        """Store one batch; raise NotPublished, which says what is known of it."""
        self._batches += 1
        # With quotes: a string of RFC 8941 (draft-ietf-httpapi-idempotency-key-header, 2.1).
        key = f'"{self._run}-{self._batches}"'
        backoff = Backoff(first=0.2, longest=10.0)
        began, tries = 0.0, 0
        doubtful = told = False
        while True:
            tries += 1
            self._progress.under_way = batch
            outcome = self._try(batch, key)
            if not isinstance(outcome, Trouble):
                self._progress.stored(batch, outcome)
                return
            # A refusal says nothing about an earlier try, whose answer was lost.
            doubtful = doubtful or not outcome.certain
            if not doubtful:
                self._progress.under_way = None
            began = began or time.monotonic()
            elapsed = time.monotonic() - began
            # On top of what the server asks for: that may be the same for all, and does not grow.
            spare = self._retry_seconds - elapsed - outcome.after_seconds
            if not outcome.temporary or spare <= 0:
                given_up = self._given_up(outcome, tries, elapsed) if outcome.temporary else ""
                rest = uncertain(batch) if doubtful else f"nothing of {batch.where} is stored"
                raise NotPublished(f"{outcome.reason}{given_up}; {rest}")
            if outcome.status == RATE_LIMITED:
                self._tell_of_rate(outcome)
            elif not told:
                told = True
                self._tell(outcome, batch, doubtful)
            time.sleep(outcome.after_seconds + min(backoff.next(), spare))

    def _try(self, batch: Batch, key: str) -> list[int] | Trouble:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        try:
            response = self._client.post(self._url, content=batch.body(), headers=headers)
        except httpx.RequestError as error:
            not_sent = isinstance(error, _NOT_SENT)
            self._reached = self._reached or not not_sent
            reason = f"{self._url}: {str(error) or type(error).__name__}"
            return Trouble(reason, certain=not_sent, temporary=self._reached)
        self._reached = True
        status = response.status_code
        if status == 201:
            seqs = seqs_of(response)
            if len(seqs) == len(batch.numbers):
                return seqs
            return Trouble(f"{self._url} answered 201 without a seq for each label", certain=False)
        certain = 400 <= status < 500 or response.is_redirect
        message = message_of(response)
        match = _INDEX.match(message)
        index = None if match is None else number_in(match[1], high=len(batch.numbers) - 1)
        if match is not None and index is not None:
            number = batch.numbers[index]
            return Trouble(f"line {number}: {message[match.end() :]}", certain)
        hint = HINTS.get(status, "")
        return Trouble(
            f"{self._url} answered {status}: {message}{hint}",
            certain,
            status in TEMPORARY,
            status,
            after_seconds(response.headers),
        )

    def _given_up(self, trouble: Trouble, tries: int, elapsed: float) -> str:
        if not self._retry_seconds:
            return ""
        text = f"; given up after {tries} {'try' if tries == 1 else 'tries'} in {elapsed:.1f} s"
        if trouble.after_seconds:
            text += (
                f": it asks to wait {trouble.after_seconds:g} s more, "
                f"--retry-seconds is {self._retry_seconds:g}"
            )
        return text

    def _tell(self, trouble: Trouble, batch: Batch, doubtful: bool) -> None:
        text = f"sending {batch.where} again for up to {self._retry_seconds:g} s"
        if doubtful:
            # Nothing in an answer tells a server that knows the header from one that does not.
            text += (
                ", with the same Idempotency-Key: a server that knows this header stores nothing "
                "twice"
            )
        say(f"{trouble.reason}; {text}")

    def _tell_of_rate(self, trouble: Trouble) -> None:
        # Once per run: a long file under a rate meets it with every batch, and that is no outage.
        if not self._told_of_rate:
            self._told_of_rate = True
            say(f"{trouble.reason}; waiting, now and whenever it answers so again")


@click.command(cls=Command, short_help="Publish labels from a file or standard input.")
@click.argument("file", type=click.File("rb"), default="-")
@option("url", server_url, "The server.", default="http://127.0.0.1:8080")
@option(
    "publish_token", token_text, "Token that may publish.",
    shown_default="the embedded server's, from --data-dir", secret=True,
)  # fmt: skip
@option(
    "data_dir", path, "Data directory of the embedded server, where its token is.",
    shown_default=shown_data_dir(),
)  # fmt: skip
@option("batch", integer(1, 1_000_000), "Most labels per request.", metavar="LABELS", default="500")
@option(
    "batch_bytes", size(1024, 1024**3),
    "Most bytes per request; the server's limit is its --body-max-bytes.",
    default="1MiB",
)  # fmt: skip
@option("from_line", integer(1, SEQ_MAX), "First line to publish.", default="1")
@option(
    "retry_seconds", seconds(0, RETRY_MAX_SECONDS),
    "How long a batch is sent again while its outcome is uncertain; 0: never.",
    default="60",
)  # fmt: skip
@tls_options
def publish(
    file: BinaryIO,
    url: str,
    publish_token: str | None,
    data_dir: Path | None,
    batch: int,
    batch_bytes: int,
    from_line: int,
    retry_seconds: float,
    tls: ssl.SSLContext,
) -> None:
    """Publish labels from FILE, one JSON label per line; - is standard input.

    A batch is sent when it is full or the input ends, and stored whole or not at
    all: a line that is wrong is named, and nothing of its batch is stored. To
    send each line as it comes, give --batch 1.

    A batch that got no answer, or 408, 429, 502, 503 or 504, is sent again with the
    same Idempotency-Key: a server that knows this header stores it once. One that
    does not, or a proxy that drops it, may store it twice: for those,
    --retry-seconds 0.

    \b
    A line:
      {"src":"did:…","uri":"at://…","val":"spam","cts":"2026-01-31T12:00:00Z"}
    """
    token = publish_token or kept_token(data_dir)
    if file.isatty():
        click.echo("reading labels from the terminal; Ctrl-D ends them", err=True)
    progress = Progress(from_line)
    batches = read_batches(file, max_labels=batch, max_bytes=batch_bytes, first=from_line)
    with (
        explained(progress),
        httpx.Client(
            timeout=TIMEOUT_SECONDS, headers={"Authorization": f"Bearer {token}"}, verify=tls
        ) as client,
        progress_bar(file) as bar,
    ):
        sender = Sender(client, f"{url}/labels", progress, retry_seconds)
        for lines in batches:
            sender.send(lines)
            bar.update((lines.position if bar.length else progress.labels) - bar.pos)
        if bar.length:
            bar.update(bar.length - bar.pos)  # empty lines at the end
    last = f", the last as seq {progress.last_seq}" if progress.labels else ""
    tell_result(f"{counted(progress.labels)} stored{last}")


def kept_token(data_dir: Path | None) -> str:
    """Return the embedded server's token; raise ConfigError when it cannot be read.

    Without a data directory: the demo's, when it runs and no other server does.
    """
    try:
        place = data_dir or default_data_dir()
        demo = place / DEMO_FOLDER
        if data_dir is None and runs_in(demo) and not runs_in(place):
            say(f"taking the token of the demo, which runs: {demo}")
            place = demo
        return read_token(place / FILE_NAME)
    except ConfigError as error:
        raise ConfigError(
            "--publish-token",
            None,
            "a token, here or as SSE_LABELS_PUBLISH_TOKEN, or the --data-dir of an embedded "
            f"server or a demo, which prints it ({error})",
        ) from error


def runs_in(data_dir: Path) -> bool:
    """Return whether an embedded server's PostgreSQL runs in a data directory."""
    return data_dir.is_dir() and EmbeddedPostgres(data_dir).runs()


def seqs_of(response: httpx.Response) -> list[int]:
    """Return the seqs that an answer tells, none when it cannot be read."""
    try:
        return [int(seq) for seq in ujson.loads(response.text)["seqs"]]
    except (ValueError, TypeError, KeyError):
        return []


def message_of(response: httpx.Response) -> str:
    """Return what an answer says about itself."""
    try:
        return str(ujson.loads(response.text)["message"])
    except (ValueError, TypeError, KeyError):
        return response.reason_phrase


@contextlib.contextmanager
def explained(progress: Progress) -> Iterator[None]:
    """Say with every failure of the block what was stored before it, and how to go on."""
    try:
        yield
    except (NotPublished, NotJson) as error:
        if isinstance(error, NotJson):
            error = NotPublished(f"{error}; nothing of its batch is stored")
        raise NotPublished(
            f"{error}; {progress} (go on with --from-line {progress.next_line})"
        ) from error
    except KeyboardInterrupt:
        where = "" if progress.under_way is None else f"; {uncertain(progress.under_way)}"
        click.echo(f"\nsse-labels: interrupted; {progress}{where}", err=True)
        raise


def progress_bar(file: BinaryIO) -> AbstractContextManager[Any]:
    """Return a progress bar on standard error: by bytes of a file, else a count of labels."""
    found = os.fstat(file.fileno())
    length = found.st_size - file.tell() if stat.S_ISREG(found.st_mode) else 0
    hidden = not sys.stderr.isatty()
    if length > 0:
        return click.progressbar(length=length, file=sys.stderr, hidden=hidden)
    return click.progressbar(
        itertools.repeat(None), file=sys.stderr, hidden=hidden, show_pos=True, label="labels"
    )


def say(text: str) -> None:
    """Tell the person at the terminal, below the progress bar if there is one."""
    click.echo(f"{chr(10) if sys.stderr.isatty() else ''}sse-labels: {text}", err=True)


def uncertain(batch: Batch) -> str:
    """Return the words for a batch that nobody answered for."""
    return f"{batch.where} may or may not be stored: look before sending them again"


def counted(labels: int) -> str:
    """Return a number of labels in words."""
    return "1 label" if labels == 1 else f"{labels} labels"
