"""`sse-labels verify URL`: checks that a stream is whole, in order, and signed by its sources.

Promises: the report is on standard output, as a few lines or as one JSON object. The exit status is
0 when the stream is sound, 1 when the report names an error, and 2 when the request was wrong. The
checks are in `sse_labels.verify`.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
from pathlib import Path
from types import FrameType

import click
import httpx
import ujson

from sse_labels.cli.layout import Command
from sse_labels.cli.options import (
    named_as_given,
    option,
    switch,
    token_option,
    url_argument,
    url_parts,
)
from sse_labels.cli.tls import tls_options
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.protocol.xrpc import SUBSCRIBE_PATH
from sse_labels.publishing.keys import source_keys_in
from sse_labels.setting_parsers import Expected, integer, path, seconds
from sse_labels.verify import Report, SocketRun, StreamRun, Wanted

#: The largest time for an option: nobody waits longer than a day for a report.
WAIT_MAX_SECONDS = 86_400
SOCKETS = ("ws", "wss")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stream_address(given: str) -> httpx.URL:
    """Return the address of a stream or of subscribeLabels; without a path it gets one."""
    expected = (
        "an address such as http://127.0.0.1:8080 or wss://labeler.example; a cursor in it must be "
        "a seq"
    )
    url_parts(given, ("http", "https", *SOCKETS), expected)
    try:
        url = httpx.URL(given.rstrip("/"))
        integer(0, SEQ_MAX)(url.params.get("cursor", "0"))
    except (Expected, httpx.InvalidURL):
        raise Expected(expected) from None
    if url.path in ("", "/"):
        return url.copy_with(path=SUBSCRIBE_PATH if url.scheme in SOCKETS else "/stream")
    return url


@click.command(cls=Command, short_help="Check that a stream is whole, in order, and signed.")
@url_argument(stream_address, "http://127.0.0.1:8080/stream")
@option("cursor", integer(0, SEQ_MAX), "Start after this seq.", metavar="SEQ",
        shown_default="the cursor of URL, else 0: everything")  # fmt: skip
@token_option
@option(
    "source_keys_file", path, "File with public keys of sources (lines DID did:key:…); none: "
    "signatures are counted, not checked.",
)  # fmt: skip
@switch("follow", "Continue after the head, until Ctrl-C.")
@option(
    "quiet_seconds", seconds(0.1, WAIT_MAX_SECONDS),
    "Over WebSocket the head is unknown: the check ends after this silence, or "
    "at a label that was made after the start.",
    default="5",
)  # fmt: skip
@option(
    "retry_seconds", seconds(0, WAIT_MAX_SECONDS),
    "How long to wait in all for a server that is away; 0: not at all.",
    default="60",
)  # fmt: skip
@switch("no_cross_check", "Read only once: do not ask queryLabels, and do not read holes again.")
@switch("json", "Write one JSON object instead of lines.")
@tls_options
def verify(
    url: httpx.URL, cursor: int | None, token: str | None, source_keys_file: Path | None,
    follow: bool, quiet_seconds: float, retry_seconds: float, no_cross_check: bool,
    json: bool, tls: ssl.SSLContext,
) -> int:  # fmt: skip
    """Read the stream at URL from end to end and check continuity and signatures.

    URL is the address of a server, or of its stream with filters. With ws: or wss:
    it is subscribeLabels of any labeler. It is also SSE_LABELS_URL. The default is
    http://127.0.0.1:8080/stream.

    Seqs must increase, also across reconnects. Labels must be well formed. Holes
    are legal; the first 100 are read again. The labels are compared with
    queryLabels of the same server. The check ends at the head that the server had
    at the start.

    \b
      sse-labels verify https://labels.example --source-keys-file keys

    The exit status is 1 when something is wrong.
    """
    with named_as_given():
        keys = None if source_keys_file is None else source_keys_in(source_keys_file)
    wanted = Wanted(
        url=url.copy_remove_param("cursor"),
        cursor=int(url.params.get("cursor", "0")) if cursor is None else cursor,
        token=token,
        keys=keys,
        follow=follow,
        cross_check=not no_cross_check,
        quiet_seconds=quiet_seconds,
        retry_seconds=retry_seconds,
        tls=tls,
        say=say,
    )
    if url.scheme in SOCKETS:
        report = asyncio.run(read_socket(SocketRun(wanted)))
    else:
        report = read_stream(StreamRun(wanted))
    write(report, as_json=json)
    if not report.sound:
        return 1
    # With --follow, Ctrl-C is the normal end.
    return 130 if report.cut_short else 0


def read_stream(run: StreamRun) -> Report:
    """Run the check; the first signal ends the reading, the second ends the command."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler)
        run.stop()

    for each in SIGNALS:
        signal.signal(each, stop)
    return run.run()


async def read_socket(run: SocketRun) -> Report:
    """Run the check; a signal ends the reading."""
    loop = asyncio.get_running_loop()
    for each in SIGNALS:
        loop.add_signal_handler(each, run.stop)
    return await run.run()


def write(report: Report, *, as_json: bool) -> None:
    """Write the report."""
    if as_json:
        click.echo(ujson.dumps(report.as_json(), escape_forward_slashes=False))
        return
    for line in report.lines():
        click.echo(line)
    click.secho(report.verdict(), fg="green" if report.sound else "red")


def say(text: str) -> None:
    """Write a message to standard error; standard output is for the report only."""
    click.echo(f"sse-labels verify: {text}", err=True)
