"""Settings: read once, checked, frozen, passed in.

Promises: this is the only file that reads the environment; a wrong value is a
`ConfigError` that names the key as the user wrote it, the value, and what was
expected; every setting has a default, a unit in its name and a line of help.
The command line is made from the fields below, and the README's table is checked against them.
Does not belong here: acting on a setting.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from sse_labels.errors import ConfigError
from sse_labels.protocol.formats import is_did
from sse_labels.protocol.seq import number_in

ENV_PREFIX = "SSE_LABELS_"

Parse = Callable[[str], Any]

#: Of these each of several workers gets its share.
SHARED = (
    "max_streams", "max_connections", "max_per_address", "backfill_max_reads",
    "publish_rate_labels", "log_lines_per_address",
)  # fmt: skip

_NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)
_ORIGIN = re.compile(
    r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE
)


class Expected(ValueError):
    """Raised by a parser: the text says what was expected."""


def integer(low: int, high: int) -> Parse:
    """Return a parser for a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        number = number_in(text, low, high)
        if number is None:
            raise Expected(f"a whole number from {low} to {high}")
        return number

    return parse


def seconds(low: float, high: float) -> Parse:
    """Return a parser for a number of seconds from `low` to `high`."""

    def parse(text: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if low <= value <= high:
            return value
        raise Expected(f"seconds from {low:g} to {high:g}")

    return parse


def size(low: int, high: int) -> Parse:
    """Return a parser for a number of bytes, written plainly or with KiB, MiB or GiB."""
    units = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

    def parse(text: str) -> int:
        digits, unit = (text[:-3].rstrip(), text[-3:]) if text[-3:] in units else (text, "")
        number = number_in(digits)
        value = None if number is None else number * units.get(unit, 1)
        if value is None or not low <= value <= high:
            raise Expected(f"bytes from {low} to {high}, e.g. 1048576 or 1MiB")
        return value

    return parse


def boolean(text: str) -> bool:
    """Read a switch the way shells write it."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise Expected("true or false")


def words(text: str) -> str:
    """Read any text that is not empty."""
    if text.strip():
        return text.strip()
    raise Expected("a value that is not empty")


def hosts(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of addresses or host names."""
    listed = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not listed:
        raise Expected("addresses such as 127.0.0.1 or ::, separated by commas")
    return listed


def path(text: str) -> Path:
    """Read a file or folder name; `~` is the home."""
    try:
        return Path(words(text)).expanduser()
    except RuntimeError:
        raise Expected("a file or folder whose ~ is the home of a user") from None


def did(text: str) -> str:
    """Read a DID."""
    if is_did(text):
        return text
    raise Expected("a DID such as did:plc:ewvi7nxzyoun6zhxrhs64oiz")


def one_of(*choices: str) -> Parse:
    """Return a parser for one word out of a list."""

    def parse(text: str) -> str:
        if text in choices:
            return text
        raise Expected(f"one of {', '.join(choices)}")

    return parse


def origins(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of web origins (RFC 6454), or `*`."""
    listed = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in listed:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise Expected("origins such as https://example.com, separated by commas, or *")
    return listed


def networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Read a comma-separated list of IP addresses and networks, or `none`."""
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise Expected(
            f"addresses or networks such as 10.0.0.0/8, separated by commas, or none ({error})"
        ) from None


def setting(
    default: Any,
    parse: Parse,
    text: str,
    *,
    group: str | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Any:
    """Declare one setting; its name in `Settings` is its option and its environment variable.

    A `group` is a heading of the help: of this setting and of those that follow.
    """
    more = {"group": group, "metavar": metavar, "secret": secret}
    return field(default=default, metadata={"parse": parse, "help": text, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that `serve` can be told. `--poll-seconds` is also `SSE_LABELS_POLL_SECONDS`."""

    host: tuple[str, ...] = setting(
        ("127.0.0.1",),
        hosts,
        "Addresses to listen on, separated by commas; :: is all, of both families.",
        metavar="HOSTS",
        group="Where it listens",
    )
    port: int = setting(8080, integer(0, 65535), "Port to listen on; 0: any.")
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
        "Whose table is read: sse-labels' own or Ozone's; auto looks.",
    )
    unsigned: str = setting(
        "stream",
        one_of("stream", "withhold"),
        "What happens to labels without a signature; those withheld are counted.",
        metavar="WHAT",
    )
    migrate: bool = setting(True, boolean, "Bring the schema up to date at start.")
    connect_timeout_seconds: float = setting(
        10.0, seconds(0.1, 3600), "How long connecting to PostgreSQL may take."
    )
    query_timeout_seconds: float = setting(30.0, seconds(0.1, 3600), "How long one query may take.")
    poll_seconds: float = setting(
        1.0, seconds(0.01, 3600), "Longest time between two looks at the table."
    )
    gather_seconds: float = setting(
        0.025, seconds(0, 10), "Shortest time between two chunks; a lone label goes at once."
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
        2.0, seconds(0.01, 3600), "Shortest wait a client is told before it reconnects."
    )
    retry_max_seconds: float = setting(
        5.0, seconds(0.01, 3600), "Longest such wait; each client gets its own in between."
    )
    outbox_max_events: int = setting(
        10_000, integer(1, 10_000_000), "Events that may wait for one consumer."
    )
    send_timeout_seconds: float = setting(
        30.0, seconds(0.05, 3600), "How long one write may wait for a client that does not read."
    )
    slow_grace_seconds: float = setting(
        5.0, seconds(0, 3600), "How long a consumer that is too slow has to take its last write."
    )
    drain_seconds: float = setting(
        3.0, seconds(0.1, 3600), "How long open requests have to end after SIGTERM."
    )
    ring_max_bytes: int = setting(
        64 * 1024**2,
        size(0, 64 * 1024**3),
        "Recent events kept in memory; beside them an eighth of it for parts cut out for readers, "
        "and an eighth for WebSocket messages.",
        group="Memory",
    )
    page_cache_max_bytes: int = setting(
        32 * 1024**2, size(0, 64 * 1024**3), "Pages of history kept in memory for the next reader."
    )
    send_buffer_bytes: int = setting(
        64 * 1024, size(4096, 1024**3), "Kernel send buffer of each connection."
    )
    publish_token: str | None = setting(
        None,
        words,
        "Token that may publish; none with a DSN: no publishing.",
        secret=True,
        group="Publishing",
    )
    publish_tokens_file: Path | None = setting(
        None, path, "File of more publish tokens, as digests; read again when changed."
    )
    publish_max_labels: int = setting(10_000, integer(1, 1_000_000), "Most labels in one POST.")
    body_max_bytes: int = setting(1024**2, size(1, 1024**3), "Largest request body.")
    publish_rate_labels: int | None = setting(
        None,
        integer(1, 1_000_000),
        "Labels per second that one publisher may publish in the long run; none: no limit.",
    )
    publish_burst_labels: int = setting(
        10_000, integer(1, 10_000_000), "Labels that it may publish at once, under that rate."
    )
    signing_key_file: Path | None = setting(
        None,
        path,
        "k256 private key (hex or PEM) that published labels are signed with.",
        group="Signatures",
    )
    signing_did: str | None = setting(
        None, did, "Source whose labels that key signs; none: every source's."
    )
    source_keys_file: Path | None = setting(
        None,
        path,
        "Public keys of sources (lines DID did:key:…): wrong signatures are refused or flagged; "
        "read again when changed.",
    )
    jwt_secret: str | None = setting(
        None,
        words,
        "Secret of the tokens that streams need (HS256); no key: streams are public.",
        secret=True,
        group="Who may read",
    )
    jwt_secret_file: Path | None = setting(
        None, path, "File with that secret; read again when changed."
    )
    jwt_key_file: Path | None = setting(
        None,
        path,
        "Public key (PEM: ES256, EdDSA) or keys (JWKS) of those tokens; read again when changed.",
    )
    jwt_issuer: str | None = setting(None, words, "Issuer (iss) that tokens must have.")
    jwt_audience: str | None = setting(None, words, "Audience (aud) that tokens must have.")
    max_connections: int = setting(
        16_000,
        integer(1, 1_000_000),
        "TCP connections open at the same time; fewer when fewer files may be open.",
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
        "How long a connection may be idle between requests; longer than a proxy keeps it.",
    )
    retention_max_age_seconds: float | None = setting(
        None,
        seconds(1, 10 * 365 * 86_400),
        "Labels older than this are deleted; none: never.",
        group="Retention",
    )
    retention_max_labels: int | None = setting(
        None, integer(1, 10**15), "Labels beyond the newest so many are deleted; none: never."
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
        "text", one_of("text", "json"), "How log lines look; json: one object a line."
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
        """Return what each of `workers` processes is started with: its share of the limits.

        It is rounded down, so that all together hold no more than the limit; and is at least 1.
        """
        limits = {name: getattr(self, name) for name in SHARED}
        shares = {
            name: max(1, limit // self.workers)
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
    """Return the settings: a given option wins, then the environment, then the default.

    `options` maps field names to what stood on the command line; `defaults` are values other than
    the fields' own. Raises `ConfigError` under the name that the user used.
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
