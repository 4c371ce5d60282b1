"""Asks queryLabels of the server whose stream is verified.

Promises: an answer is a page of labels whose cursor is after the requested one. Otherwise
`NotCompared` names the reason.
Does not belong here: comparing (`crosscheck`).
"""

from __future__ import annotations

import time

import httpx

from sse_labels.client.answers import asking, object_in, place_of, refusal
from sse_labels.client.retries import Lost, Refused, Retries
from sse_labels.protocol.seq import number_in
from sse_labels.verify.crosscheck import NotCompared, QueryPage

NAME = "com.atproto.label.queryLabels"
#: A page of the longest labels has 3 MB.
PAGE_MAX_BYTES = 16 * 1024**2
#: Parameters of the stream that a query does not get.
NO_PARAMETERS = ("cursor", "epoch", "limit")


class LabelQueries:
    """Asks for pages, with the filters of the stream."""

    def __init__(self, client: httpx.Client, stream: httpx.URL, retry_seconds: float) -> None:
        self._client = client
        self._url = query_url(stream)
        self._place = place_of(self._url)
        self.retry_seconds = retry_seconds

    def page(self, cursor: int, limit: int) -> QueryPage:
        """Return at most `limit` labels after `cursor`, with retries. Raises NotCompared."""
        retries = Retries(self.retry_seconds)
        try:
            while True:
                try:
                    return self._once(cursor, limit)
                except Lost as lost:
                    time.sleep(retries.wait_seconds(lost))
        except Refused as error:
            raise NotCompared(str(error)) from None

    def _once(self, cursor: int, limit: int) -> QueryPage:
        url = self._url.copy_merge_params({"cursor": str(cursor), "limit": str(limit)})
        with asking(self._place), self._client.stream("GET", url) as answer:
            if answer.status_code != 200:
                raise refusal(self._place, answer)
            body = bytearray()
            for part in answer.iter_bytes():
                body += part
                if len(body) > PAGE_MAX_BYTES:
                    raise Refused(f"{self._place} answers with more than a page")
        said = object_in(body.decode("utf-8", "replace"))
        labels = None if said is None else said.get("labels")
        if said is None or not isinstance(labels, list) or len(labels) > limit:
            raise NotCompared(f"{self._place} does not answer as its lexicon says")
        given = said.get("cursor")
        if given is None:
            return QueryPage(labels, None)
        following = number_in(given) if isinstance(given, str) else None
        if following is None or following <= cursor:
            raise NotCompared(f"{self._place}: the cursor after {cursor} is {str(given)[:60]!r}")
        return QueryPage(labels, following)


def query_url(stream: httpx.URL) -> httpx.URL:
    """Return the URL of queryLabels with the stream's filters. Without uriPatterns: every URI."""
    folder, _, name = stream.path.rpartition("/")
    if name == "stream":
        folder += "/xrpc"
    elif not folder.endswith("/xrpc"):
        folder = "/xrpc"
    url = stream.copy_with(path=f"{folder}/{NAME}")
    for parameter in NO_PARAMETERS:
        url = url.copy_remove_param(parameter)
    return url if "uriPatterns" in url.params else url.copy_add_param("uriPatterns", "*")
