"""`sse-labels publish [FILE|-]`: labels from lines of JSON.

Promises: lines go in by batches, in order; a batch is stored whole or not at
all, and it ends with a line's number when one is wrong; what was stored before
is said, so that one can go on from there.
Does not belong here: reading lines (`lines`); what makes a label valid (the
server says).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import click
import httpx
import ujson

from sse_labels.cli.layout import Command
from sse_labels.cli.lines import Batch, NotJson, read_batches
from sse_labels.cli.options import option, server_url
from sse_labels.config import Expected, integer, path, size, words
from sse_labels.embedded import default_data_dir
from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.publish_token import FILE_NAME, read_token

TIMEOUT_SECONDS = 60.0
#: How the server names a label of a request.
_INDEX = re.compile(r"^labels\[(\d+)\](?:\.|: )?")
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
        #: The batch that was sent and not answered yet.
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


def token_text(text: str) -> str:
    """Read a token that can stand in a header (RFC 9110, 5.5: visible ASCII)."""
    if text.isascii() and text.isprintable() and " " not in words(text):
        return text
    raise Expected("a token of visible ASCII characters, without spaces")


@click.command(cls=Command, short_help="Publish labels from a file or standard input.")
@click.argument("file", type=click.File("rb"), default="-")
@option("url", server_url, "The server.", metavar="URL", default="http://127.0.0.1:8080")
@option(
    "publish_token", token_text, "Token that may publish.", metavar="TOKEN",
    shown_default="the embedded server's, from --data-dir", secret=True,
)  # fmt: skip
@option(
    "data_dir", path, "Data directory of the embedded server, where its token is.",
    metavar="DIR", shown_default=str(default_data_dir()),
)  # fmt: skip
@option("batch", integer(1, 1_000_000), "Most labels per request.", metavar="LABELS", default="500")
@option(
    "batch_bytes", size(1024, 1024**3),
    "Most bytes per request; the server's limit is its --body-max-bytes.",
    metavar="BYTES", default="1MiB",
)  # fmt: skip
@option("from_line", integer(1, 2**63 - 1), "First line to publish.", metavar="LINE", default="1")
def publish(
    file: BinaryIO,
    url: str,
    publish_token: str | None,
    data_dir: Path | None,
    batch: int,
    batch_bytes: int,
    from_line: int,
) -> None:
    """Publish labels from FILE, one JSON label per line; - is standard input.

    A batch is sent when it is full or the input ends, and stored whole or not at
    all: a line that is wrong is named, and nothing of its batch is stored. To
    send each line as it comes, give --batch 1.

    \b
    A line:
      {"src":"did:…","uri":"at://…","val":"spam","cts":"2026-01-31T12:00:00Z"}
    """
    token = publish_token or kept_token(data_dir or default_data_dir())
    if file.isatty():
        click.echo("reading labels from the terminal; Ctrl-D ends them", err=True)
    progress = Progress(from_line)
    batches = read_batches(file, max_labels=batch, max_bytes=batch_bytes, first=from_line)
    with (
        explained(progress),
        httpx.Client(
            timeout=TIMEOUT_SECONDS, headers={"Authorization": f"Bearer {token}"}
        ) as client,
        progress_bar(file) as bar,
    ):
        for lines in batches:
            progress.under_way = lines
            progress.stored(lines, send(client, f"{url}/labels", lines))
            progress.under_way = None
            bar.update((lines.position if bar.length else progress.labels) - bar.pos)
        if bar.length:
            bar.update(bar.length - bar.pos)  # empty lines at the end
    last = f", the last as seq {progress.last_seq}" if progress.labels else ""
    click.echo(f"{counted(progress.labels)} stored{last}")


def kept_token(data_dir: Path) -> str:
    """Return the embedded server's token; raise ConfigError when it cannot be read."""
    try:
        return read_token(data_dir / FILE_NAME)
    except ConfigError as error:
        raise ConfigError(
            "--publish-token",
            None,
            "a token, here or as SSE_LABELS_PUBLISH_TOKEN, or the --data-dir of an embedded "
            f"server ({error})",
        ) from error


def send(client: httpx.Client, url: str, batch: Batch) -> list[int]:
    """Store one batch; return its seqs. Raise NotPublished naming the line."""
    headers = {"Content-Type": "application/json"}
    try:
        response = client.post(url, content=batch.body(), headers=headers)
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, _NOT_SENT):
            raise NotPublished(f"{url}: {reason}; nothing of {batch.where} is stored") from error
        raise NotPublished(f"{url}: {reason}; {uncertain(batch)}") from error
    if response.status_code == 201:
        return [int(seq) for seq in ujson.loads(response.text)["seqs"]]
    try:
        message = str(ujson.loads(response.text)["message"])
    except (ValueError, TypeError, KeyError):
        message = response.reason_phrase
    match = _INDEX.match(message)
    if match is not None and int(match[1]) < len(batch.numbers):
        number = batch.numbers[int(match[1])]
        raise NotPublished(
            f"line {number}: {message[match.end() :]}; nothing of {batch.where} is stored"
        )
    certain = 400 <= response.status_code < 500 or response.is_redirect
    rest = f"nothing of {batch.where} is stored" if certain else uncertain(batch)
    hint = " (a smaller --batch or --batch-bytes?)" if response.status_code == 413 else ""
    raise NotPublished(f"{url} answered {response.status_code}: {message}{hint}; {rest}")


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


def uncertain(batch: Batch) -> str:
    """Return the words for a batch that nobody answered for."""
    return f"{batch.where} may or may not be stored: look before sending them again"


def counted(labels: int) -> str:
    """Return a number of labels in words."""
    return "1 label" if labels == 1 else f"{labels} labels"
