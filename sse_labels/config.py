"""The settings: read once, checked, and passed in as one frozen object.

Promises: only this file reads the environment. A wrong value is a `ConfigError` that names the key
as the user wrote it, the value, and what was expected. Every setting has a default, a unit in its
name and a line of help. The command line is made from the fields of `Settings`; a test compares the
README's table with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from sse_labels.errors import ConfigError
from sse_labels.setting_parsers import (
    Expected,
    Parse,
    boolean,
    did,
    hosts,
    integer,
    networks,
    one_of,
    origins,
    path,
    seconds,
    size,
    words,
)

ENV_PREFIX = "SSE_LABELS_"

#: Limits of a whole server: each of several workers gets its share of them.
SHARED = (
    "max_streams", "max_connections", "max_per_address", "backfill_max_reads",
    "publish_rate_labels", "log_lines_per_address",
)  # fmt: skip
#: Lines come in pairs, when a stream opens and when it closes.
LEAST_SHARE = {"log_lines_per_address": 2}


def setting(
    default: Any,
    parse: Parse,
    text: str,
    *,
    group: str | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Any:
    """Declare one setting; its option and its environment variable are made from its field's name.

    A `group` is a heading in the help. It stands above this setting and the settings that follow.
    """
    more = {"group": group, "metavar": metavar, "secret": secret}
    return field(default=default, metadata={"parse": parse, "help": text, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of `serve`. `--poll-seconds` is also `SSE_LABELS_POLL_SECONDS`."""

    host: tuple[str, ...] = setting(
        ("127.0.0.1",),
        hosts,
        "Addresses to listen on, separated by commas; :: is every address, IPv4 and IPv6.",
        metavar="HOSTS",
        group="Where it listens",
    )
    port: int = setting(8080, integer(0, 65535), "Port to listen on; 0: any free port.")
    workers: int = setting(
        1, integer(1, 64), "Processes that serve, each on a core of its own.", metavar="PROCESSES"
    )
    cors_origins: tuple[str, ...] = setting(
        ("*",), origins, "Web origins that may read, separated by commas."
    )
    dsn: str | None = setting(
        None,
        words,
        "PostgreSQL to read from (URI or key=value); none: the embedded one.",
        secret=True,
        group="The database",
    )
    data_dir: Path | None = setting(None, path, "Where the embedded PostgreSQL keeps its data.")
    source: str = setting(
        "auto",
        one_of("auto", "own", "ozone"),
        "Whose table is read: sse-labels' own or Ozone's; auto finds out.",
    )
    unsigned: str = setting(
        "stream",
        one_of("stream", "withhold"),
        "What happens to labels without a signature; withheld labels are counted.",
        metavar="WHAT",
    )
    migrate: bool = setting(True, boolean, "Bring the schema up to date at start.")
    connect_timeout_seconds: float = setting(
        10.0, seconds(0.1, 3600), "How long connecting to PostgreSQL may take."
    )
    query_timeout_seconds: float = setting(30.0, seconds(0.1, 3600), "How long one query may take.")
    poll_seconds: float = setting(
        1.0, seconds(0.01, 3600), "Longest time between two reads of new labels from the table."
    )
    gather_seconds: float = setting(
        0.025, seconds(0, 10), "Shortest time between two chunks; a single label is sent at once."
    )
    page_max_events: int = setting(
        500, integer(1, 100_000), "Events read from the database at once."
    )
    backfill_max_reads: int = setting(
        4, integer(1, 100), "Pages that all backfills together read at the same time."
    )
    max_streams: int = setting(
        15_000, integer(1, 1_000_000), "Streams open at the same time.", group="Streams"
    )
    heartbeat_seconds: float = setting(
        15.0, seconds(0.05, 3600), "Silence after which a heartbeat is written."
    )
    retry_min_seconds: float = setting(
        2.0, seconds(0.01, 3600), "Shortest wait (retry:) before a client reconnects."
    )
    retry_max_seconds: float = setting(
        5.0, seconds(0.01, 3600), "Longest such wait; each client is given a random one in between."
    )
    outbox_max_events: int = setting(
        10_000, integer(1, 10_000_000), "Events that may wait for one consumer."
    )
    send_timeout_seconds: float = setting(
        30.0, seconds(0.05, 3600), "How long one write may wait for a client that does not read."
    )
    slow_grace_seconds: float = setting(
        5.0,
        seconds(0, 3600),
        "How long a consumer that is too slow may take to read the end of its stream.",
    )
    drain_seconds: float = setting(
        3.0, seconds(0.1, 3600), "How long open requests may take to end after SIGTERM."
    )
    ring_max_bytes: int = setting(
        64 * 1024**2,
        size(0, 64 * 1024**3),
        "Recent events kept in memory. An eighth more may hold filtered parts of them, and another "
        "eighth WebSocket messages.",
        group="Memory",
    )
    page_cache_max_bytes: int = setting(
        32 * 1024**2, size(0, 64 * 1024**3), "Pages of history kept in memory for later readers."
    )
    send_buffer_bytes: int = setting(
        64 * 1024, size(4096, 1024**3), "Kernel send buffer of each connection."
    )
    publish_token: str | None = setting(
        None,
        words,
        "Token that may publish; with a DSN and without a token, publishing is off.",
        secret=True,
        group="Publishing",
    )
    publish_tokens_file: Path | None = setting(
        None, path, "File with the digests of more publish tokens; read again when changed."
    )
    publish_max_labels: int = setting(10_000, integer(1, 1_000_000), "Most labels in one POST.")
    body_max_bytes: int = setting(1024**2, size(1, 1024**3), "Largest request body.")
    publish_rate_labels: int | None = setting(
        None,
        integer(1, 1_000_000),
        "Labels per second that one publisher may publish in the long run; none: no limit.",
    )
    publish_burst_labels: int = setting(
        10_000,
        integer(1, 10_000_000),
        "Labels that one publisher may publish at once, when its rate is limited.",
    )
    signing_key_file: Path | None = setting(
        None,
        path,
        "k256 private key (hex or PEM) that published labels are signed with.",
        group="Signatures",
    )
    signing_did: str | None = setting(
        None, did, "Source whose labels the signing key signs; none: labels of every source."
    )
    source_keys_file: Path | None = setting(
        None,
        path,
        "File with public keys of sources (lines DID did:key:…), read again when changed. Wrong "
        "signatures are refused or flagged.",
    )
    jwt_secret: str | None = setting(
        None,
        words,
        "Secret of the tokens that readers need (HS256); without any key, streams are public.",
        secret=True,
        group="Who may read",
    )
    jwt_secret_file: Path | None = setting(
        None, path, "File with the secret of readers' tokens; read again when changed."
    )
    jwt_key_file: Path | None = setting(
        None,
        path,
        "File with the public key (PEM: ES256, EdDSA) or keys (JWKS) of readers' tokens; "
        "read again when changed.",
    )
    jwt_issuer: str | None = setting(None, words, "Issuer (iss) that tokens must have.")
    jwt_audience: str | None = setting(None, words, "Audience (aud) that tokens must have.")
    max_connections: int = setting(
        16_000,
        integer(1, 1_000_000),
        "TCP connections open at the same time; fewer when the limit of open files is lower.",
        group="Limits of connections",
    )
    max_per_address: int = setting(
        1_000,
        integer(1, 1_000_000),
        "Connections, and streams, that one address may hold; trusted proxies are not limited.",
        metavar="CONNECTIONS",
    )
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = setting(
        (ip_network("127.0.0.0/8"), ip_network("::1")),
        networks,
        "Addresses and networks whose X-Forwarded-For is believed, separated by commas, or none.",
        metavar="NETWORKS",
    )
    request_seconds: float = setting(
        20.0,
        seconds(0.05, 3600),
        "How long a request's head may take to arrive, and then its body.",
    )
    keepalive_seconds: float = setting(
        75.0,
        seconds(0.05, 3600),
        "How long a connection may be idle between requests; give more than a proxy's own limit.",
    )
    retention_max_age_seconds: float | None = setting(
        None,
        seconds(1, 10 * 365 * 86_400),
        "Labels older than this are deleted; none: never.",
        group="Retention",
    )
    retention_max_labels: int | None = setting(
        None,
        integer(1, 10**15),
        "Number of newest labels that are kept; older labels are deleted; none: never.",
    )
    retention_sweep_seconds: float = setting(
        60.0, seconds(0.05, 86_400), "Time between two rounds of deleting."
    )
    retention_batch_labels: int = setting(1_000, integer(1, 100_000), "Labels deleted at once.")
    log_level: str = setting(
        "info",
        one_of("debug", "info", "warning", "error"),
        "Least severe line logged.",
        group="Logging",
    )
    log_format: str = setting(
        "text", one_of("text", "json"), "Form of log lines; json: one object per line."
    )
    log_lines_per_address: int = setting(
        600,
        integer(2, 1_000_000),
        "Log lines a minute that one address may cause; the rest is counted.",
        metavar="LINES",
    )

    def __post_init__(self) -> None:
        if self.retry_max_seconds < self.retry_min_seconds:
            raise ConfigError(
                option_name("retry_max_seconds"),
                self.retry_max_seconds,
                f"at least --retry-min-seconds, which is {self.retry_min_seconds:g}",
            )

    def of_one_worker(self) -> Settings:
        """Return the settings of one of `workers` processes, with its share of each limit.

        A share is rounded down, and at least 1 (2 log lines): all workers together exceed only a
        limit that is below the number of workers.
        """
        limits = {name: getattr(self, name) for name in SHARED}
        shares = {
            name: max(LEAST_SHARE.get(name, 1), limit // self.workers)
            for name, limit in limits.items()
            if limit is not None
        }  # fmt: skip
        return replace(self, **shares)


def option_name(name: str) -> str:
    """Return a setting's name on the command line."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """Return a setting's name in the environment."""
    return ENV_PREFIX + name.upper()


def load(
    options: Mapping[str, str | None],
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings. An option wins over the environment, and that over the default.

    `options` maps names of fields to texts from the command line. `defaults` replace defaults of
    the fields. Raises `ConfigError`, which names the option or the variable that the user gave.
    """
    values = dict(defaults or {})
    for spec in fields(Settings):
        values |= read(spec.name, spec.metadata["parse"], options, environ, spec.metadata["secret"])
    return Settings(**values)


def read(
    name: str,
    parse: Parse,
    options: Mapping[str, str | None],
    environ: Mapping[str, str] | None = None,
    secret: bool = False,
) -> dict[str, Any]:
    """Return `{name: value}` from the option or the environment, `{}` when neither is given."""
    environ = os.environ if environ is None else environ
    key, text = option_name(name), options.get(name)
    if text is None:
        # An empty variable is how shells and unit files say "not set".
        key, text = env_name(name), environ.get(env_name(name)) or None
    if text is None:
        return {}
    try:
        return {name: parse(text)}
    except Expected as error:
        raise ConfigError(key, "(not shown)" if secret else text, str(error)) from None
