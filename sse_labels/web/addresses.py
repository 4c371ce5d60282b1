"""Who the client is, and how much one client may hold.

Promises: `X-Forwarded-For` counts only as far as proxies that the operator trusts
wrote it, so nobody chooses the address they are counted under; one address holds
no more than it may, and what it held is free again when it ends.
Stands at the edge of the corridor: the guard and the stream handler ask it.
Does not belong here: sockets, answers.

Own code, not a library: aiohttp-remotes' `XForwardedFiltered` (1.4.0) never looks at
the peer, so whoever connects directly chooses their address, and it answers 400 to
the two header lines that HTTP allows in place of one (RFC 9110, section 5.3).
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

#: What a household or an office gets: who has one address of it has all of them (RFC 6177).
IPV6_PREFIX = 64
#: Longer is no address, whatever port and scope stand in it.
MAX_ADDRESS_CHARACTERS = 100
#: Addresses of which it is remembered what they are: parsing one takes 10 µs.
REMEMBERED = 4096
#: When a client that holds too much may try again, in seconds.
RETRY_SECONDS = 30


class TrustedProxies:
    """Knows whose `X-Forwarded-For` to believe."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = tuple(networks)

    def trusts(self, address: str) -> bool:
        """Tell whether `address` is one of the proxies."""
        parsed = parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def client(self, request: web.Request) -> str:
        """Return the client's address: the last one that no trusted proxy stands behind.

        Every proxy adds its own peer on the right, so what stands left of the first
        address that is not trusted may be anybody's invention. Empty for a Unix socket.
        """
        address = request.remote or ""
        if address.startswith("::ffff:"):
            # A socket for both families.
            address = str(parse_address(address) or address)
        if not self.trusts(address):
            return address
        listed = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR, ()))
        for entry in reversed(listed.split(",")):
            parsed = parse_address(entry)
            if parsed is None:
                # Nothing, or `unknown`: no more is known than the proxy that wrote it.
                return address
            address = str(parsed)
            if not self.trusts(address):
                return address
        return address


def reader_of(address: str, subject: str | None) -> str:
    """Return whom reads are shared among: whose token it is if it says, else the address.

    A proxy that nobody stands behind, as far as it says, is one as well.
    """
    return f"address {group(address)}" if subject is None else f"subject {subject}"


class PerAddress:
    """Counts what addresses hold; an IPv6 network of 64 bits counts as one address."""

    def __init__(self, most: int, exempt: Callable[[str], bool]) -> None:
        """`exempt` tells which addresses have no limit."""
        self._most = most
        self._exempt = exempt
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        """Return how many addresses hold something."""
        return len(self._held)

    def take(self, address: str) -> str | None:
        """Hold one more, and return what `give_back` takes; raise TooManyFromAddress."""
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
        """Hold one less."""
        if key is None:
            return
        # An address that holds nothing takes no memory.
        left = self._held.pop(key) - 1
        if left:
            self._held[key] = left


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address that `text` is, also with a port, else None.

    `::ffff:192.0.2.1` is 192.0.2.1: that is how a socket for both families shows its peers.
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
        # A scope (fe80::1%eth0) says which link, not who; in a header it is whatever was sent.
        parsed = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, IPv6Address) else parsed


def caused_by(address: str, **fields: object) -> dict[str, object]:
    """Return the `extra` of a log line that whoever is at `address` can cause at will."""
    return {"caused_by": group(address), "peer": address, **fields}


@lru_cache(REMEMBERED)
def group(address: str) -> str:
    """Return what an address is counted under."""
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed, IPV6_PREFIX), strict=False))
    return address if parsed is None else str(parsed)
