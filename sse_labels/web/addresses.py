"""Finds the client's address, and limits what one address may hold.

Promises: only entries of `X-Forwarded-For` that trusted proxies wrote are used, so no client can
choose its own address. One address never holds more than its limit. A connection or stream that
ends frees its share.

This is own code, because the library aiohttp-remotes (`XForwardedFiltered`, 1.4.0) never checks
the peer. So a client that connects directly could choose its address. It also answers 400 to two
header lines, which HTTP allows in place of one (RFC 9110, section 5.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

from aiohttp import hdrs, web

from sse_labels.errors import TooManyFromAddress

Network = IPv4Network | IPv6Network

#: The IPv6 network of a household or an office. A client with one of its addresses has all of
#: them (RFC 6177).
IPV6_PREFIX = 64
#: No address is longer, even with a port and a scope.
MAX_ADDRESS_CHARACTERS = 100
#: The number of parsed addresses in the cache: parsing one takes 10 µs.
REMEMBERED = 4096
#: How long a client over its limit should wait, in seconds.
RETRY_SECONDS = 30


class TrustedProxies:
    """The proxies whose `X-Forwarded-For` is trusted."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = tuple(networks)

    def trusts(self, address: str) -> bool:
        """Return whether `address` is one of the proxies."""
        parsed = parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def client(self, request: web.Request) -> str:
        """Return the client's address: from the right, the first address that is not trusted.

        Every proxy appends the address of its own peer on the right. Everything left of the first
        untrusted address may be forged. The result is empty for a Unix socket.
        """
        address = request.remote or ""
        if address.startswith("::ffff:"):
            # A socket for both families shows IPv4 peers like this.
            address = str(parse_address(address) or address)
        if not self.trusts(address):
            return address
        listed = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR, ()))
        for entry in reversed(listed.split(",")):
            parsed = parse_address(entry)
            if parsed is None:
                # Empty, or `unknown`: only the proxy that wrote the entry is known.
                return address
            address = str(parsed)
            if not self.trusts(address):
                return address
        return address


def reader_of(address: str, subject: str | None) -> str:
    """Return the name under which the reads of one reader are counted.

    The name is the subject of the reader's token, or else the address.
    """
    return f"address {group(address)}" if subject is None else f"subject {subject}"


class PerAddress:
    """Counts what each address holds. An IPv6 /64 network counts as one address."""

    def __init__(self, most: int, exempt: Callable[[str], bool]) -> None:
        """`exempt` returns whether an address has no limit."""
        self._most = most
        self._exempt = exempt
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        """Return how many addresses hold something."""
        return len(self._held)

    def take(self, address: str) -> str | None:
        """Count one more, and return the key for `give_back`. Raises TooManyFromAddress."""
        if self._exempt(address):
            return None
        key = group(address)
        held = self._held.get(key, 0)
        if held >= self._most:
            raise TooManyFromAddress(
                f"{self._most} connections are open from {key}, the most that one address may hold",
                RETRY_SECONDS,
            )
        self._held[key] = held + 1
        return key

    def give_back(self, key: str | None) -> None:
        """Count one less."""
        if key is None:
            return
        # An address that holds nothing needs no memory.
        left = self._held.pop(key) - 1
        if left:
            self._held[key] = left


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address in `text`, which may have a port. None: `text` is not an address.

    `::ffff:192.0.2.1` is read as 192.0.2.1: a socket for both families shows IPv4 peers like this.
    """
    return _parse(text) if len(text) <= MAX_ADDRESS_CHARACTERS else None


@lru_cache(REMEMBERED)
def _parse(text: str) -> IPv4Address | IPv6Address | None:
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        # A scope (fe80::1%eth0) names a link, not a client. In a header a scope may be forged.
        parsed = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, IPv6Address) else parsed


def caused_by(address: str, **fields: object) -> dict[str, object]:
    """Return the `extra` of a log line that the client at `address` can cause at will."""
    return {"caused_by": group(address), "peer": address, **fields}


@lru_cache(REMEMBERED)
def group(address: str) -> str:
    """Return the key under which an address is counted."""
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed, IPV6_PREFIX), strict=False))
    return address if parsed is None else str(parsed)
