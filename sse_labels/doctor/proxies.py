"""Proxies: which one stands before a server, and how to configure it for streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sse_labels.web.answers import SERVER


class Proxy(NamedTuple):
    """A proxy's name, and what each fault is corrected with."""

    name: str = "a proxy that does not name itself"
    #: It gathers the stream.
    unbuffered: str = "let it pass /stream on unbuffered"
    #: It compresses.
    uncompressed: str = "let it leave text/event-stream uncompressed (it says no-transform)"
    #: It ends a stream that is silent.
    patient: str = "let it keep a silent response for 60 s"


#: By a word in the header `Server` or `Via`. From nginx' ngx_http_proxy_module and
#: ngx_http_gzip_module, Apache's mod_proxy and mod_env (no-gzip), and Caddy's reverse_proxy.
KNOWN = {
    "nginx": Proxy(
        "nginx",
        "proxy_buffering off (and no proxy_ignore_headers X-Accel-Buffering) in `location = "
        "/stream`, as nginx/sse_labels.conf has it",
        "gzip off in `location = /stream`",
        "proxy_read_timeout 60s in `location = /stream`",
    ),
    "apache": Proxy(
        "Apache",
        "ProxyPass … flushpackets=on",
        "SetEnvIf Request_URI ^/stream$ no-gzip",
        "ProxyPass … timeout=60",
    ),
    "caddy": Proxy(
        "Caddy",
        "flush_interval -1 in reverse_proxy",
        "no `encode` for /stream",
        "no read_timeout under 60s in reverse_proxy's transport",
    ),
}


def proxy_of(headers: Mapping[str, str]) -> Proxy | None:
    """Return the proxy that a response came through; None when nothing tells of one."""
    server, via = headers.get("server", ""), headers.get("via", "")
    for word, proxy in KNOWN.items():
        if word in server.lower() or word in via.lower():
            return proxy
    name = via or ("" if server == SERVER else server)
    return Proxy(f"a proxy that calls itself {name}") if name else None
