"""The sockets that a server listens on, and their addresses.

Promises: a port in use, or an address that this machine does not have, raises a ConfigError
that names the setting. No socket is left open after the error.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from sse_labels.config import Settings, option_name
from sse_labels.errors import ConfigError
from sse_labels.web.door.connection import end_dead_peers

#: Connections that may wait to be accepted. 10,000 connects took 16 s with 128, and less than 3 s
#: with 4096.
BACKLOG = 4096
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listening_sockets(settings: Settings) -> list[socket.socket]:
    """Return bound sockets for every address of the hosts. Raises ConfigError."""
    places = {host: _addresses(host, settings.port) for host in settings.host}
    # `::` accepts IPv6 and IPv4, unless `0.0.0.0` is in the setting too.
    both = "0.0.0.0" not in settings.host and socket.has_dualstack_ipv6()  # noqa: S104
    sockets: dict[str, socket.socket] = {}
    port = settings.port
    try:
        for host, addresses in places.items():
            for family, address in addresses:
                if address[0] in sockets:
                    continue
                try:
                    listener = socket.create_server(
                        (address[0], port, *address[2:]), family=family, backlog=BACKLOG,
                        dualstack_ipv6=both and address[0] == "::",
                    )  # fmt: skip
                except OSError as error:
                    if error.errno in _NO_SUCH_ADDRESS:
                        # A name may have addresses of both families on a machine with one family.
                        continue
                    # Not str(error): the text of asyncio and socket repeats the address.
                    reason = os.strerror(error.errno or 0)
                    raise ConfigError(
                        option_name("port"), port, f"a free port on {address[0]} ({reason})"
                    ) from error
                sockets[address[0]] = listener
                port = listener.getsockname()[1]
                _tune(listener, settings)
            if not any(address[0] in sockets for _, address in addresses):
                raise ConfigError(option_name("host"), host, "an address of this machine")
    except BaseException:
        for listener in sockets.values():
            listener.close()
        raise
    return list(sockets.values())


def _tune(listener: socket.socket, settings: Settings) -> None:
    """Set the options that every accepted connection inherits."""
    # A reader that does not read holds this much kernel memory, instead of 4 MiB.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_bytes)
    end_dead_peers(
        listener,
        quiet_seconds=settings.heartbeat_seconds,
        # The delivery cuts off a slow but reachable reader within this time.
        unanswered_seconds=settings.send_timeout_seconds + settings.slow_grace_seconds,
    )


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Return the addresses of a host. Raises ConfigError when the host has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name that can be looked up"
        raise ConfigError(
            option_name("host"), host, f"an address of this machine ({reason})"
        ) from error
    return [(family, address) for family, _, _, _, address in found]


def base_urls(settings: Settings, port: int) -> str:
    """Return the addresses of a server as URLs, separated by commas."""
    return ",".join(base_url(host, port) for host in settings.host)


def base_url(host: str, port: int) -> str:
    """Return a server's address as a URL, an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
