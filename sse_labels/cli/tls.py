"""The options of TLS, for every command that is a client of a server.

They are not in `options`, because a server needs no HTTP client: importing one took a tenth of the
server's start (test_a_server_starts_without_an_http_client).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import wraps
from typing import Any

import httpx

from sse_labels.cli.options import key_of, option, switch
from sse_labels.errors import ConfigError
from sse_labels.setting_parsers import Expected, path


def tls_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ca-file and --insecure; the command gets the context `tls` that is made from them."""

    @wraps(command)
    def with_tls(
        *arguments: Any, ca_file: ssl.SSLContext | None, insecure: bool, **options: Any
    ) -> Any:
        if ca_file is not None and insecure:
            raise ConfigError(key_of("ca_file"), "it and --insecure", "one of the two")
        tls = any_certificate() if insecure else ca_file or known_authorities()
        return command(*arguments, tls=tls, **options)

    with_switch = switch("insecure", "Accept any TLS certificate.")(with_tls)
    return option(
        "ca_file", authorities_in, "Certificates (PEM) of the authorities to trust over TLS.",
        shown_default="the system's, and Mozilla's list",
    )(with_switch)  # fmt: skip


def authorities_in(text: str) -> ssl.SSLContext:
    """Read a file of certificates; the context trusts only these."""
    try:
        return ssl.create_default_context(cafile=path(text))
    except OSError as error:
        # ssl.SSLError is an OSError, too.
        why = error.strerror or "it has none"
        raise Expected(f"a readable file of certificates, in PEM ({why})") from None


def known_authorities() -> ssl.SSLContext:
    """Return a context that trusts the authorities of httpx and of this machine."""
    context = httpx.create_ssl_context()
    context.load_default_certs()
    return context


def any_certificate() -> ssl.SSLContext:
    """Return a context that accepts every certificate."""
    return httpx.create_ssl_context(verify=False)
