"""Serves the files of the folder `page`: the page that shows the stream, and `labels.js`.

Promises: the URLs follow the folder's tree. The page loads nothing from other servers, and its
Content-Security-Policy enforces this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from aiohttp import hdrs, web

FOLDER = Path(__file__).with_name("page")
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
#: The page may load files and the stream of this server, and nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageFile:
    """Answers with one file. The server reads the file once, at its start."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._type = CONTENT_TYPES[path.suffix]
        self._etag = hashlib.sha256(self._content).hexdigest()[:32]

    async def handle(self, request: web.Request) -> web.Response:
        """Answer with the file, or with 304 when the client already has it."""
        # A browser asks again each time, so after an update no page mixes files of two versions.
        headers = {hdrs.CACHE_CONTROL: "no-cache", "Content-Security-Policy": POLICY}
        if any(etag.value == self._etag for etag in request.if_none_match or ()):
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(
                body=self._content, content_type=self._type, charset="utf-8", headers=headers
            )
            response.enable_compression()
        response.etag = self._etag
        return response


def page_files() -> Iterator[tuple[str, PageFile]]:
    """Yield each file of the page with its URL's path. The path of `index.html` is `/`."""
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in CONTENT_TYPES:
            name = path.relative_to(FOLDER).as_posix()
            yield "/" + name.removesuffix("index.html"), PageFile(path)
