"""`sse-labels doctor [URL]`: what is wrong with a deployment, and how to fix it.

Promises: each finding is written at once as a line, or all of them at the end as one JSON object.
The exit status is 0 when nothing failed, 1 when something failed, and 2 when the request was wrong.
Nothing is changed, unless --publish-as is given. The checks are in `sse_labels.doctor`.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

import click
import ujson

from sse_labels.cli.layout import Command
from sse_labels.cli.options import (
    named_as_given,
    option,
    server_url,
    settings_options,
    switch,
    token_option,
    url_argument,
)
from sse_labels.cli.place import database_at
from sse_labels.cli.signals import interruptible
from sse_labels.cli.tls import tls_options
from sse_labels.config import Settings, load
from sse_labels.doctor import Finding, Target, Verdict, examine
from sse_labels.embedded import EmbeddedPostgres, default_data_dir
from sse_labels.setting_parsers import did

#: The colour of each verdict, where the output has colours.
COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILURE: "red"}
#: The width of the longest verdict and two spaces.
VERDICT_COLUMNS = 11


def server_address(text: str) -> str:
    """Read the address of a server; from the address of a stream take that of its server."""
    return server_url(text).partition("?")[0].removesuffix("/stream")


@click.command(cls=Command, short_help="Say what is wrong with a deployment.")
@url_argument(server_address)
@settings_options(
    "dsn", "data_dir", "workers", "migrate", "backfill_max_reads", "max_connections",
    "publish_token", "publish_tokens_file", "retention_max_age_seconds", "retention_max_labels",
    "connect_timeout_seconds", "query_timeout_seconds",
)  # fmt: skip
@token_option
@option(
    "publish_as", did, "Store a label of this source and its negation, and wait for both.",
    metavar="DID",
)  # fmt: skip
@switch("json", "Write one JSON object instead of lines.")
@tls_options
def doctor(
    url: str | None, token: str | None, publish_as: str | None, json: bool,
    tls: ssl.SSLContext, **options: str | None,
) -> int:  # fmt: skip
    """Check a deployment from its database to a reader, and say what is wrong.

    URL is the server's address as its readers know it. The check then includes
    every proxy in between: a proxy may buffer the stream, compress it, cut it or
    drop Last-Event-ID. Give the same settings as to `serve`. The check takes as
    long as one heartbeat of the server.

    \b
      sse-labels doctor https://labels.example --dsn postgresql://…

    The exit status is 1 when a check failed; warnings do not change it.
    """
    with named_as_given(), interruptible():
        settings = load(options)
        dsn, embedded = place_of(settings)
        database = None if dsn is None else database_at(settings, dsn)
        target = Target(settings, database, embedded, url, token, publish_as, tls)
        findings = asyncio.run(report(target, as_lines=not json))
    verdicts = [finding.verdict for finding in findings]
    counted = {verdict: verdicts.count(verdict) for verdict in Verdict}
    if json:
        listed = [finding._asdict() for finding in findings]
        click.echo(
            ujson.dumps({"findings": listed, "counts": counted}, escape_forward_slashes=False)
        )
    else:
        click.echo(", ".join(f"{number} {verdict}" for verdict, number in counted.items()))
    return 1 if counted[Verdict.FAILURE] else 0


def place_of(settings: Settings) -> tuple[str | None, bool]:
    """Return the DSN to check, and whether it is the embedded PostgreSQL's.

    The DSN is None when the embedded PostgreSQL does not run. It is not started.
    """
    if settings.dsn is not None:
        return settings.dsn, False
    postgres = EmbeddedPostgres(settings.data_dir or default_data_dir())
    return (postgres.dsn if postgres.runs() else None), True


async def report(target: Target, *, as_lines: bool) -> list[Finding]:
    """Return all findings; with `as_lines` write each one as soon as it is found."""
    findings = []
    try:
        async for finding in examine(target):
            findings.append(finding)
            if as_lines:
                write(finding)
    finally:
        if target.database is not None:
            target.database.close()
    return findings


def write(finding: Finding) -> None:
    """Write what was seen, and below it what to do."""
    colour = COLOURS.get(finding.verdict)
    verdict = click.style(f"{finding.verdict:<{VERDICT_COLUMNS}}", fg=colour)
    click.echo(f"{verdict}{finding.subject}: {finding.seen}")
    if finding.do:
        click.echo(f"{'':{VERDICT_COLUMNS}}→ {finding.do}")
    sys.stdout.flush()
