"""Parsers of settings: each turns the text of one value into the value, or says what was expected.

Promises: a parser either returns a value that is within its limits or raises `Expected`. The
message of `Expected` says what was expected and never repeats the text, which may be a secret.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from sse_labels.protocol.formats import is_did
from sse_labels.protocol.seq import number_in

Parse = Callable[[str], Any]

_NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)
_ORIGIN = re.compile(
    r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE
)


class Expected(ValueError):
    """A parser refuses a text; the message says what was expected."""


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
    """Read true or false, in one of the spellings that shells use."""
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
    """Read the name of a file or folder; `~` is the user's home."""
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
