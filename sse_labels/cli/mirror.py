"""`sse-labels mirror URL…`: stores the labels of other labelers here; `serve` streams them.

Promises: each upstream is followed by itself and retried forever. An upstream that is away delays
no other. SIGTERM, SIGHUP and Ctrl-C end the command. The next run continues after the last label
that was stored. `sse_labels.mirror` follows one upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlunsplit

import click

from sse_labels.cli.layout import Command
from sse_labels.cli.options import (
    key_of,
    named_as_given,
    option,
    settings_options,
    switch,
    url_parts,
)
from sse_labels.cli.place import database_at, database_of
from sse_labels.cli.signals import Ready, interruptible, run_until_signal
from sse_labels.cli.tls import tls_options
from sse_labels.config import Settings, load
from sse_labels.database import migrations
from sse_labels.database.pool import Database
from sse_labels.database.schema import Schema
from sse_labels.errors import ConfigError, SchemaError
from sse_labels.logs import configure_logging
from sse_labels.mirror.following import Mirror
from sse_labels.mirror.storing import may_mirror, own_sources
from sse_labels.mirror.upstream import Upstream
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.protocol.xrpc import SUBSCRIBE_PATH
from sse_labels.publishing.keys import source_keys_in
from sse_labels.setting_parsers import Expected, did, integer, seconds, size

PORTS = {"ws": 80, "wss": 443}
#: Parameters that an address must not have, and why.
OWN_PARAMETERS = {
    "cursor": "the database keeps the cursor; --cursor is for the first time",
    "epoch": "the database keeps it",
    "access_token": "it would be logged and stored, and it expires in five minutes",
}


class Wanted(NamedTuple):
    """An upstream as the user named it."""

    url: str
    did: str | None


def upstream(text: str) -> Wanted:
    """Read `wss://…` or `DID=wss://…`; an address without a path gets that of subscribeLabels."""
    source, address = None, text
    if text.startswith("did:"):
        given, _, address = text.partition("=")
        source = did(given)
    expected = "a labeler's address such as wss://labeler.example, or DID=wss://…"
    parts = url_parts(address, ("ws", "wss", "http", "https"), expected)
    if parts.fragment:
        raise Expected(expected)
    if parts.username is not None or parts.password is not None:
        raise Expected("an address without a user and a password: addresses are logged and stored")
    query = parse_qsl(parts.query, keep_blank_values=True)
    for name, instead in OWN_PARAMETERS.items():
        if any(pair[0] == name for pair in query):
            raise Expected(f"an address without {name}: {instead}")
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    path = parts.path if parts.path not in ("", "/") else SUBSCRIBE_PATH
    # One spelling for each upstream, because each spelling has a cursor of its own.
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, PORTS[scheme]) else f":{parts.port}"
    return Wanted(urlunsplit((scheme, f"{host}{port}", path, urlencode(query), "")), source)


def upstreams(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> list[Wanted]:
    """Read the arguments."""
    found = []
    for text in given:
        try:
            found.append(upstream(text))
        except Expected as error:
            shown = "(not shown)" if "@" in text or "token" in text else text
            raise ConfigError("URL", shown, str(error)) from None
    for wanted in found:
        if found.count(wanted) > 1:
            raise ConfigError("URL", wanted.url, "each upstream once")
    return found


@click.command(cls=Command, short_help="Store the labels of other labelers.")
@click.argument("wanted", metavar="URL...", nargs=-1, required=True, callback=upstreams)
@option(
    "cursor", integer(0, SEQ_MAX), "Seq of the upstream after which an upstream that was never "
    "followed begins; 0: everything.", metavar="SEQ", default="0",
)  # fmt: skip
@option(
    "message_max_bytes", size(1024, 1024**3), "Largest message of an upstream.",
    default="1MiB",
)  # fmt: skip
@option(
    "message_max_labels", integer(1, 1_000_000), "Most labels in one message of an upstream.",
    default="10000",
)  # fmt: skip
@option(
    "report_seconds", seconds(0.05, 86_400), "Time between two log lines that say what was stored.",
    default="60",
)  # fmt: skip
@option(
    "retry_longest_seconds", seconds(0.05, 86_400), "Longest wait before an upstream, or the "
    "database, is tried again.", default="60",
)  # fmt: skip
@switch(
    "any_source", "Take labels of every source, also without a signature; for upstreams that are "
    "trusted with all sources.",
)  # fmt: skip
@settings_options(
    "dsn", "data_dir", "migrate", "connect_timeout_seconds", "query_timeout_seconds",
    "source_keys_file", "log_level", "log_format",
)  # fmt: skip
@tls_options
def mirror(
    wanted: list[Wanted],
    cursor: int,
    message_max_bytes: int,
    message_max_labels: int,
    report_seconds: float,
    retry_longest_seconds: float,
    any_source: bool,
    tls: ssl.SSLContext,
    **options: str | None,
) -> None:
    """Follow the subscribeLabels of other labelers, and store their labels here.

    URL is DID=wss://labeler.example, a source and the address of its labeler:
    only labels of that source are taken. An address without a DID needs
    --source-keys-file or --any-source. With the file, only labels with a right
    signature of a source in the file are taken. Labels of sources that are
    published here are never taken. `serve`, with the same --dsn or --data-dir,
    streams all labels. Signatures are kept. With --source-keys-file, labels with
    a wrong signature are set aside.

    The cursor of each upstream is stored in the same transaction as its labels.
    No crash loses or doubles a label. Two mirrors may run at the same time: one
    waits until the other has ended.
    """
    with named_as_given(), contextlib.suppress(KeyboardInterrupt), interruptible():
        settings = load(options)
        configure_logging(settings.log_level, settings.log_format)
        keys = (
            None if settings.source_keys_file is None else source_keys_in(settings.source_keys_file)
        )
        for each in wanted:
            if each.did is None and keys is None and not any_source:
                raise ConfigError(
                    "URL",
                    each.url,
                    "the source whose labels are taken, as DID=wss://…; or --source-keys-file, to "
                    "take labels with right signatures; or --any-source, for an upstream that is "
                    "trusted with every source",
                )
        found = [
            Upstream(
                each.url,
                did=each.did,
                source_keys=keys,
                any_source=any_source,
                message_max_bytes=message_max_bytes,
                message_max_labels=message_max_labels,
                tls=tls,
            )
            for each in wanted
        ]

        async def follow(stop: asyncio.Event, up: Ready) -> None:
            database = database_at(settings, place.dsn)
            try:
                await prepare(database, settings, [each.did for each in wanted if each.did])
                async with asyncio.TaskGroup() as tasks:
                    running = []
                    for each in found:
                        one = Mirror(
                            each,
                            database.connect,
                            first_cursor=cursor,
                            retry_longest_seconds=retry_longest_seconds,
                        )
                        running += [tasks.create_task(one.run())]
                        running += [tasks.create_task(one.report(report_seconds))]
                    await up(0)
                    await stop.wait()
                    for task in running:
                        task.cancel()
            finally:
                database.close()

        with database_of(settings, key_of("dsn")) as place:
            run_until_signal(follow)


async def prepare(database: Database, settings: Settings, sources: list[str]) -> None:
    """Prepare the database to store labels of `sources`.

    Raises SchemaError, or ConfigError for a source whose labels are published in this database.
    """
    schema = Schema(database)
    await schema.find_source()
    if schema.attached:
        raise SchemaError(
            "--dsn", "Ozone's database", "one of sse-labels' own: Ozone's is never written"
        )
    if settings.migrate:
        await migrations.migrate(database)
    await schema.check()
    if not await may_mirror(database):
        raise SchemaError(
            "--dsn",
            "a role that may not mirror, or a schema that is too old",
            "tables made by `sse-labels migrate`, and the rights that the README's table lists",
        )
    for own in await own_sources(database, sources):
        raise ConfigError(
            "URL",
            f"{own}=…",
            "a source that is not this database's own: its labels are published here, and none are "
            "taken from an upstream. If they are no longer published here, DELETE FROM "
            f"label_own_source WHERE src = '{own}'",
        )
