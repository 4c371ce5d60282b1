"""`POST /labels`: who may publish, and what a publish request looks like.

Promises: an answer of 4xx has stored nothing, one of 201 everything; a token is compared in
constant time and never logged; however many publish at once, streams have their turn in between,
and memory is bounded.
Does not belong here: what makes a label valid (`labels`), SQL.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict

from aiohttp import hdrs, web

from sse_labels.errors import InvalidRequest, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from sse_labels.publishing.publisher import Publisher
from sse_labels.publishing.rate import PublishRate
from sse_labels.publishing.tokens import PUBLISH, PublishTokens
from sse_labels.web.answers import json_response
from sse_labels.web.bearer import holder_of
from sse_labels.web.strict_json import parse_json

IDEMPOTENCY_KEY = "Idempotency-Key"
KEY_MAX_CHARS = 255
#: A body of so many bytes is read at once: aiohttp keeps as much of it unasked.
SMALL_BODY_BYTES = 64 * 1024
#: Labels take about ten times their body's size while they are checked and stored. So many bodies
#: of each size are at it at the same time, and no more of the large ones are read; the rest waits.
SMALL_AT_ONCE = 64
LARGE_AT_ONCE = 4
#: Of one publisher: whoever sends many leaves the others their share.
LARGE_OF_ONE_AT_ONCE = 2
#: Codings of a body (RFC 9110, section 8.4.1), one at a time.
CODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
OFF = "publishing is off: this server was started without a publish token"


class PublishHandler:
    """Answers `POST /labels`; without a token publishing is off."""

    def __init__(
        self,
        publisher: Publisher,
        tokens: PublishTokens,
        rate: PublishRate,
        *,
        max_labels: int,
        body_seconds: float,
    ) -> None:
        self._publisher = publisher
        self._tokens = tokens
        self._rate = rate
        self._max_labels = max_labels
        self._body_seconds = body_seconds
        self._small = asyncio.Semaphore(SMALL_AT_ONCE)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        #: By publisher, of which there are as many as tokens.
        self._of_publisher: dict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(LARGE_OF_ONE_AT_ONCE)
        )

    async def handle(self, request: web.Request) -> web.Response:
        """Answer `201 {"seqs": […]}`, in the order of the labels given."""
        publisher = holder_of(request, self._tokens, PUBLISH, OFF)
        check_coding(request)
        key = idempotency_key(request, publisher)
        if is_small(request):
            body = await read_body(request, self._body_seconds)
            async with self._small:
                seqs = await self._publish(body, publisher, key)
        else:
            # What waits here stays with its sender, but for what the kernel and aiohttp take.
            async with self._of_publisher[publisher], self._large:
                body = await read_body(request, self._body_seconds)
                seqs = await self._publish(body, publisher, key)
        return json_response({"seqs": seqs}, status=201)

    async def _publish(self, body: bytes, publisher: str, key: bytes | None) -> list[int]:
        async with self._publisher.turn():
            labels = self._labels(body)
        self._rate.take(publisher, len(labels))
        return await self._publisher.publish(labels, key)

    def _labels(self, body: bytes) -> list[object]:
        try:
            # A byte order mark may be there (RFC 8259, section 8.1); it says nothing.
            text = body.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the body is not UTF-8: byte {error.start}") from None
        given = parse_json(text)
        if not isinstance(given, dict):
            raise InvalidRequest('expected an object {"labels": […]}')
        unknown = sorted(set(given) - {"labels"})
        if unknown:
            raise InvalidRequest(f"unknown field {unknown[0][:60]!r}, expected only 'labels'")
        labels = given.get("labels")
        if not isinstance(labels, list) or not labels:
            raise InvalidRequest("labels: expected an array of at least one label")
        if len(labels) > self._max_labels:
            raise PayloadTooLarge(f"labels: got {len(labels)}, expected at most {self._max_labels}")
        return labels


async def read_body(request: web.Request, seconds: float) -> bytes:
    """Return the body; raise RequestTimeout when it is not whole in time.

    aiohttp waits for a body as long as its sender likes; over `client_max_size` it
    raises HTTPRequestEntityTooLarge.
    """
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError:
        raise RequestTimeout(f"expected the whole body within {seconds:g} s") from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the body cannot be decoded: {error}") from None


def check_coding(request: web.Request) -> None:
    """Raise UnsupportedMediaType when the body comes in a coding that is not decoded."""
    given = ", ".join(request.headers.getall(hdrs.CONTENT_ENCODING, [])).strip().lower()
    if given not in CODINGS:
        raise UnsupportedMediaType(
            f"Content-Encoding: got {given[:60]!r}, expected gzip or deflate"
        )


def is_small(request: web.Request) -> bool:
    """Say whether the body is known to be small, also when it is decoded."""
    length = request.content_length
    return (
        length is not None
        and length <= SMALL_BODY_BYTES
        and hdrs.CONTENT_ENCODING not in request.headers
    )


def idempotency_key(request: web.Request, publisher: str) -> bytes | None:
    """Return what stands for the request's Idempotency-Key, if it has one.

    Bound to who publishes: two publishers may choose the same key.
    """
    given = request.headers.getall(IDEMPOTENCY_KEY, [])
    if not given:
        return None
    if len(given) > 1 or not 1 <= len(given[0]) <= KEY_MAX_CHARS or not given[0].isascii():
        raise InvalidRequest(
            f"{IDEMPOTENCY_KEY}: expected once, 1 to {KEY_MAX_CHARS} ASCII characters"
        )
    return hashlib.sha256(f"{publisher}\0{given[0]}".encode()).digest()
