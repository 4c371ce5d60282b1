"""`GET /`: the page that shows the stream.

Promises: one file, nothing from elsewhere, and a policy that holds it to that.
Stands beside the corridor; it is a consumer like any other.
Does not belong here: what the page does (`dashboard.html`).
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from functools import cache
from pathlib import Path

from aiohttp import hdrs, web

#: Only the script and the style that stand in the page itself; nothing is loaded but the stream.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def _page() -> str:
    return Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")


@cache
def _policy() -> str:
    return POLICY.format(script=_hashes("script"), style=_hashes("style"))


def _hashes(element: str) -> str:
    """Return what allows these elements of the page and no others (CSP level 3, 2.3.1)."""
    contents = re.findall(f"<{element}>(.*?)</{element}>", _page(), re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)


async def dashboard(request: web.Request) -> web.Response:
    """Answer the page."""
    return web.Response(
        text=_page(),
        content_type="text/html",
        headers={
            hdrs.CACHE_CONTROL: "no-cache",
            "Content-Security-Policy": _policy(),
        },
    )
