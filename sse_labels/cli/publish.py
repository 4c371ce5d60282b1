"""`sse-labels publish [FILE|-]`: labels from lines of JSON.

Promises: lines go in by batches, in order; a batch is stored whole or not at
all, and it ends with a line's number when one is wrong; what was stored before
is said, so that one can go on from there.
Does not belong here: what makes a label valid (the server says).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
import httpx
import ujson

from sse_labels.cli.options import option
from sse_labels.config import integer, path, words
from sse_labels.embedded import default_data_dir
from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.publish_token import FILE_NAME, read_token
from sse_labels.sse import dumps

TIMEOUT_SECONDS = 60.0
_INDEX = re.compile(r"^labels\[(\d+)\]\.?")


class NotPublished(SseLabelsError):
    """Something was not stored; the message says which line, and what was stored before."""


class Line:
    """One label as it was read, and the number of its line, from 1."""

    __slots__ = ("label", "number")

    def __init__(self, number: int, label: Any) -> None:
        self.number = number
        self.label = label


def read_batches(file: BinaryIO, size: int, first: int) -> Iterator[list[Line]]:
    """Yield batches of at most `size` lines, from line `first` on; empty lines are skipped."""
    batch: list[Line] = []
    for number, raw in enumerate(file, start=1):
        if number < first or not raw.strip():
            continue
        try:
            batch.append(Line(number, ujson.loads(raw.decode("utf-8"))))
        except ValueError as error:
            raise NotPublished(f"line {number}: not JSON in UTF-8: {error}") from None
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def send(client: httpx.Client, url: str, batch: list[Line]) -> int:
    """Store one batch; return the last seq. Raise NotPublished naming the line."""
    lines = f"lines {batch[0].number} to {batch[-1].number}"
    body = dumps({"labels": [line.label for line in batch]})
    try:
        response = client.post(url, content=body, headers={"Content-Type": "application/json"})
    except httpx.TransportError as error:
        raise NotPublished(
            f"{lines}: {error or type(error).__name__}; they may or may not be stored"
        ) from error
    if response.status_code == 201:
        return int(ujson.loads(response.text)["seqs"][-1])
    try:
        message = str(ujson.loads(response.text)["message"])
    except (ValueError, TypeError, KeyError):
        message = response.reason_phrase
    match = _INDEX.match(message)
    if match is None or int(match[1]) >= len(batch):
        raise NotPublished(f"{lines}: answered {response.status_code}: {message}")
    raise NotPublished(f"line {batch[int(match[1])].number}: {message[match.end() :]}")


@click.command()
@click.argument("file", type=click.File("rb"), default="-")
@option("url", words, "The server.", metavar="URL", default="http://127.0.0.1:8080")
@option(
    "publish_token",
    words,
    "Token that may publish; default: the embedded server's, when readable.",
    metavar="TOKEN",
)
@option("data_dir", path, "Where that server keeps it.", metavar="DIR")
@option("batch", integer(1, 10_000), "Labels per request.", metavar="LABELS", default="500")
@option("from_line", integer(1, 2**63 - 1), "First line to publish.", metavar="N", default="1")
def publish(
    file: BinaryIO,
    url: str,
    publish_token: str | None,
    data_dir: Path | None,
    batch: int,
    from_line: int,
) -> None:
    """Publish labels from FILE, one JSON label per line; - is standard input."""
    token = publish_token or read_token((data_dir or default_data_dir()) / FILE_NAME)
    stored = last_line = last_seq = 0
    with (
        httpx.Client(
            timeout=TIMEOUT_SECONDS, headers={"Authorization": f"Bearer {token}"}
        ) as client,
        progress_bar(file) as bar,
    ):
        try:
            for lines in read_batches(file, batch, from_line):
                last_seq = send(client, f"{url.rstrip('/')}/labels", lines)
                stored += len(lines)
                last_line = lines[-1].number
                bar.update(file.tell() - bar.pos if file.seekable() else len(lines))
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ConfigError("--url", url, f"the address of a server ({error})") from None
        except NotPublished as error:
            done = (
                f"; {stored} labels were stored before it, up to line {last_line}" if stored else ""
            )
            raise NotPublished(f"{error}; nothing of its batch is stored{done}") from None
    click.echo(f"{stored} labels stored" + (f", the last as seq {last_seq}" if stored else ""))


def progress_bar(file: BinaryIO) -> Any:
    """Return a progress bar on standard error, by bytes when the length is known."""
    size = None
    if file.seekable():
        size = file.seek(0, 2)
        file.seek(0)
    return click.progressbar(length=size, file=sys.stderr, hidden=not sys.stderr.isatty())
