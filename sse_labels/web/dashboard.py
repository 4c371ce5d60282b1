"""`GET /`: the page that shows the stream.

Promises: one file, nothing from elsewhere, and a policy that holds it to that.
Stands beside the corridor; it is a consumer like any other.
Does not belong here: what the page does (`dashboard.html`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from aiohttp import hdrs, web

#: Scripts and styles stand in the page itself; nothing is loaded but the stream.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def _page() -> str:
    return Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")


async def dashboard(request: web.Request) -> web.Response:
    """Answer the page."""
    return web.Response(
        text=_page(),
        content_type="text/html",
        headers={
            hdrs.CACHE_CONTROL: "no-cache",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        },
    )
