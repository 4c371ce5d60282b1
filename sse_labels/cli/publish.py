"""`sse-labels publish [FILE|-]`: publishes labels from lines of JSON.

Promises: lines are sent in batches and in order. A batch is stored whole or not at all. A wrong
line ends the command; the message names its number and the line from which to continue. A batch
without an answer is sent again with the same Idempotency-Key, so that a server that knows the key
stores the batch once. When it is not known whether a batch was stored, the message says so.
"""

from __future__ import annotations

import os
import re
import secrets
import ssl
import stat
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import click
import httpx

from sse_labels.backoff import Backoff
from sse_labels.cli.layout import Command
from sse_labels.cli.lines import Batch, NotPublished, read_batches
from sse_labels.cli.options import option, server_url, shown_data_dir, token_text
from sse_labels.cli.standard_streams import write_result
from sse_labels.cli.tls import tls_options
from sse_labels.client.answers import ERROR_MAX, object_in, words
from sse_labels.client.retries import after_seconds
from sse_labels.embedded import default_data_dir
from sse_labels.errors import ConfigError
from sse_labels.protocol.seq import SEQ_MAX, number_in
from sse_labels.publishing.own_token import FILE_NAME, read_token
from sse_labels.setting_parsers import integer, path, seconds, size

TIMEOUT_SECONDS = 60.0
#: The server forgets a key after a day (`retention`); after that it would store the batch again.
RETRY_MAX_SECONDS = 43_200
RATE_LIMITED = 429
#: Statuses after which the same request may succeed.
TEMPORARY = {408, RATE_LIMITED, 502, 503, 504}
#: Added to the message about a batch that may be stored already.
WITH_KEY = ", with the same Idempotency-Key: a server that knows this header stores nothing twice"
#: What to do about some answers.
HINTS = {
    401: " (give a token that may publish: --publish-token, or SSE_LABELS_PUBLISH_TOKEN)",
    413: " (a smaller --batch or --batch-bytes?)",
}
#: How an error of the server names a label of the request.
_INDEX = re.compile(r"^labels\[([0-9]+)\](?:\.|: )?")
#: Failures before the request was sent.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)


class Trouble(NamedTuple):
    """Why one try did not store its batch."""

    reason: str
    #: Whether it is certain that this try stored nothing.
    certain: bool
    #: Whether the same request may succeed later.
    temporary: bool = False
    status: int | None = None
    #: How long the server asks to wait; 0: the server gives no time.
    after_seconds: float = 0.0


class Sender:
    """Sends batches one after the other, each until its result is known.

    A batch is sent again until `retry_seconds` after its first failure. The last try still has its
    whole time-out.
    """

    def __init__(
        self, client: httpx.Client, url: str, first_line: int, retry_seconds: float
    ) -> None:
        self._client = client
        self._url = url
        self._retry_seconds = retry_seconds
        #: The line from which another run would continue.
        self._next_line = first_line
        # New for each run: a user who publishes the same lines again wants them stored again.
        self._run = secrets.token_hex(16)
        self._batches = 0
        #: Whether a server ever answered. If not, the address may be wrong: no retry.
        self._reached = False
        #: Failures that were reported already: a key, or a status.
        self._reported: set[object] = set()
        #: How many labels were stored so far.
        self.labels = 0
        self.last_seq: object = None
        #: The batch that may be stored, although no answer said so.
        self.under_way: Batch | None = None

    def progress(self) -> str:
        """Return as a phrase what was stored so far."""
        if not self.labels:
            return "nothing was stored before"
        return f"{counted(self.labels)} stored before, up to line {self._next_line - 1}"

    def how_to_go_on(self) -> str:
        """Return the end of an error message: what was stored, and from which line to continue."""
        return f"{self.progress()} (go on with --from-line {self._next_line})"

    def send(self, batch: Batch) -> None:
        """Store one batch. Raises NotPublished, which says whether the batch may be stored."""
        self._batches += 1
        # With quotes: a string of RFC 8941 (draft-ietf-httpapi-idempotency-key-header, 2.1).
        key = f'"{self._run}-{self._batches}"'
        backoff = Backoff(first=0.2, longest=10.0)
        began = 0.0
        doubtful = False
        while True:
            self.under_way = batch
            trouble = self._try(batch, key)
            if trouble is None:
                self.under_way = None
                return
            # A refusal does not tell whether an earlier try, whose answer was lost, stored it.
            doubtful = doubtful or not trouble.certain
            if not doubtful:
                self.under_way = None
            began = began or time.monotonic()
            elapsed = time.monotonic() - began
            # Added to the time that the server asks for, which may be equal for all clients.
            spare = self._retry_seconds - elapsed - trouble.after_seconds
            if not trouble.temporary or spare <= 0:
                reason = trouble.reason
                if trouble.temporary and self._retry_seconds:
                    reason += f"; given up after {elapsed:.1f} s"
                    if trouble.after_seconds:
                        reason += f": it asks to wait {trouble.after_seconds:g} s more"
                rest = uncertain(batch) if doubtful else f"nothing of {batch.where} is stored"
                raise NotPublished(f"{reason}; {rest}")
            # With a rate limit every batch of a long file meets it: report it once per run.
            failure = trouble.status if trouble.status == RATE_LIMITED else key
            if failure not in self._reported:
                self._reported.add(failure)
                again = f"sending {batch.where} again for up to {self._retry_seconds:g} s"
                # An answer does not show whether the server knows the header.
                say(f"{trouble.reason}; {again}{WITH_KEY if doubtful else ''}")
            time.sleep(trouble.after_seconds + min(backoff.next(), spare))

    def _try(self, batch: Batch, key: str) -> Trouble | None:
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
        said = object_in(response.text) or {}
        if status == 201:
            seqs = said.get("seqs")
            if not isinstance(seqs, list) or len(seqs) != len(batch.numbers):
                reason = f"{self._url} answered 201 without a seq for each label"
                return Trouble(reason, certain=False)
            self.labels += len(seqs)
            self._next_line, self.last_seq = batch.numbers[-1] + 1, seqs[-1]
            return None
        certain = 400 <= status < 500 or response.is_redirect
        message = words(said.get("message"), ERROR_MAX) or response.reason_phrase
        match = _INDEX.match(message)
        index = None if match is None else number_in(match[1], high=len(batch.numbers) - 1)
        if match is not None and index is not None:
            number = batch.numbers[index]
            return Trouble(f"line {number}: {message[match.end() :]}", certain)
        reason = f"{self._url} answered {status}: {message}{HINTS.get(status, '')}"
        after = after_seconds(response.headers)
        return Trouble(reason, certain, status in TEMPORARY, status, after)


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
    "How long a batch without a final answer is sent again; 0: never.",
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

    A batch is sent when it is full or the input ends. It is stored whole or not at
    all. The error for a wrong line names the line, and nothing of its batch is
    stored. To send each line at once, give --batch 1.

    A batch without an answer, or with 408, 429, 502, 503 or 504, is sent again with
    the same Idempotency-Key. A server that knows this header stores the batch once.
    A server that does not know it, or a proxy that drops it, may cause labels to be
    stored twice: then give --retry-seconds 0.

    \b
    A line looks like this:
      {"src":"did:…","uri":"at://…","val":"spam","cts":"2026-01-31T12:00:00Z"}
    """
    token = publish_token or kept_token(data_dir)
    if file.isatty():
        click.echo("reading labels from the terminal; Ctrl-D ends them", err=True)
    batches = read_batches(file, max_labels=batch, max_bytes=batch_bytes, first=from_line)
    headers = {"Authorization": f"Bearer {token}"}
    with (
        httpx.Client(timeout=TIMEOUT_SECONDS, headers=headers, verify=tls) as client,
        progress_bar(file) as bar,
    ):
        sender = Sender(client, f"{url}/labels", from_line, retry_seconds)
        try:
            for lines in batches:
                sender.send(lines)
                bar.update(lines.position - bar.pos)
        except NotPublished as error:
            raise NotPublished(f"{error}; {sender.how_to_go_on()}") from error
        except KeyboardInterrupt:
            where = "" if sender.under_way is None else f"; {uncertain(sender.under_way)}"
            say(f"interrupted; {sender.progress()}{where}")
            raise
    last = f", the last as seq {sender.last_seq}" if sender.labels else ""
    write_result(f"{counted(sender.labels)} stored{last}")


def kept_token(data_dir: Path | None) -> str:
    """Return the embedded server's token; raise ConfigError when it cannot be read."""
    try:
        return read_token((data_dir or default_data_dir()) / FILE_NAME)
    except ConfigError as error:
        raise ConfigError(
            "--publish-token",
            None,
            "a token, here or as SSE_LABELS_PUBLISH_TOKEN, or the --data-dir of an embedded "
            f"server or a demo, which prints it ({error})",
        ) from error


def progress_bar(file: BinaryIO) -> AbstractContextManager[Any]:
    """Return a progress bar on standard error, by bytes of a file; hidden for a pipe."""
    found = os.fstat(file.fileno())
    length = found.st_size - file.tell() if stat.S_ISREG(found.st_mode) else 0
    hidden = not (length and sys.stderr.isatty())
    return click.progressbar(length=length, file=sys.stderr, hidden=hidden)


def say(text: str) -> None:
    """Write a message to standard error, below the progress bar if there is one."""
    click.echo(f"{chr(10) if sys.stderr.isatty() else ''}sse-labels: {text}", err=True)


def uncertain(batch: Batch) -> str:
    """Return the sentence about a batch that was not answered."""
    return f"{batch.where} may or may not be stored: look before sending them again"


def counted(labels: int) -> str:
    """Return `1 label` or `2 labels`."""
    return "1 label" if labels == 1 else f"{labels} labels"
