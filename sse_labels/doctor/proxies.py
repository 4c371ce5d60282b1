"""Recognises the proxy before a server, and knows how to configure it for streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sse_labels.web.answers import SERVER


class Proxy(NamedTuple):
    """The name of a proxy, and for each fault the setting that corrects it."""

    name: str = "a proxy that does not name itself"
    #: For a proxy that buffers the stream.
    unbuffered: str = "let it pass /stream on unbuffered"
    #: For a proxy that compresses the stream.
    uncompressed: str = "let it leave text/event-stream uncompressed (it says no-transform)"
    #: For a proxy that ends a silent stream.
    lasting: str = "let it keep a silent response for 60 s"


#: Proxies by a word in the header `Server` or `Via`. The settings are those of nginx'
#: ngx_http_proxy_module and ngx_http_gzip_module, Apache's mod_proxy and mod_env (no-gzip), and
#: Caddy's reverse_proxy.
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
    """Return the proxy that a response came through; None when no header names one."""
    server, via = headers.get("server", ""), headers.get("via", "")
    for word, proxy in KNOWN.items():
        if word in server.lower() or word in via.lower():
            return proxy
    name = via or ("" if server == SERVER else server)
    return Proxy(f"a proxy that calls itself {name}") if name else None
