"""`sse-labels mirror URL…`: other labelers' labels, stored here and served from here.

Promises: each upstream is followed for ever, by itself: one that is away holds up no other.
SIGTERM, SIGHUP and Ctrl-C end it; what was stored is stored, and the next run goes on there.
Does not belong here: how one is followed (`mirror`).
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
from sse_labels.cli.signals import Ready, interruptible, until_told
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
#: What an address cannot say, and why.
OWN_PARAMETERS = {
    "cursor": "where it stands is kept in the database; --cursor is for the first time",
    "epoch": "it is kept in the database",
    "access_token": "it would be logged and stored, and be over in five minutes",
}


class Wanted(NamedTuple):
    """An upstream as it was asked for."""

    url: str
    did: str | None


def upstream(text: str) -> Wanted:
    """Read `wss://…` or `DID=wss://…`; a server's address alone gets the method's path."""
    source, address = None, text
    if text.startswith("did:"):
        given, _, address = text.partition("=")
        source = did(given)
    expected = "a labeler's address such as wss://labeler.example, or DID=wss://…"
    parts = url_parts(address, ("ws", "wss", "http", "https"), expected)
    if parts.fragment:
        raise Expected(expected)
    if parts.username is not None or parts.password is not None:
        raise Expected("an address without a user and a password: it is logged, and stored")
    query = parse_qsl(parts.query, keep_blank_values=True)
    for name, instead in OWN_PARAMETERS.items():
        if any(pair[0] == name for pair in query):
            raise Expected(f"an address without {name}: {instead}")
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    path = parts.path if parts.path not in ("", "/") else SUBSCRIBE_PATH
    # One spelling of a place, for it has one cursor.
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
    "cursor", integer(0, SEQ_MAX), "Where an upstream that was never followed begins: after this "
    "seq of its own; 0: everything.", metavar="SEQ", default="0",
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
    "report_seconds", seconds(0.05, 86_400), "Time between two lines that say what was stored.",
    default="60",
)  # fmt: skip
@option(
    "retry_longest_seconds", seconds(0.05, 86_400), "Longest wait before an upstream, or the "
    "database, is tried again.", default="60",
)  # fmt: skip
@switch(
    "any_source", "Let an upstream speak for every source, without a signature too: one that is "
    "trusted with all of them.",
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

    URL is DID=wss://labeler.example, a source and its labeler's address: labels
    of that source alone are taken. An address alone needs --source-keys-file, and
    then speaks for the sources whose signatures are right, or --any-source. No
    upstream speaks for sources whose labels are published here. `serve`, on the
    same --dsn or --data-dir, streams all of them. Signatures are kept; with
    --source-keys-file labels that are signed wrongly are set aside.

    How far an upstream was followed is kept in the database, in the transaction
    that stores its labels: whatever dies, none is lost and none doubled. Two such
    programs do not hurt each other; one waits until the other has ended.
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
                    "whose labels it may bring: name their source, DID=wss://…; or give "
                    "--source-keys-file, for the sources whose signatures are right; or, if it is "
                    "trusted with every source, --any-source",
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
            until_told(follow)


async def prepare(database: Database, settings: Settings, sources: list[str]) -> None:
    """Bring the database to where labels of `sources` can be stored in it.

    Raises SchemaError, or ConfigError for a source that is the database's own.
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
            "a source that is not this database's own: its labels are published here, and no "
            "upstream speaks for it. If that has ended, DELETE FROM label_own_source WHERE src = "
            f"'{own}'",
        )
