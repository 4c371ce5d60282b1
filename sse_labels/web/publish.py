"""`POST /labels`: who may publish, and the format of the request.

Promises: after a 4xx answer nothing is stored, after 201 everything. A token is compared in
constant time and never logged. Streams continue while many clients publish, and memory is bounded.
Does not belong here: the rules for a valid label (`protocol.label`), SQL.
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
#: Bodies up to this size are read before they wait: aiohttp buffers as much of a body anyway.
SMALL_BODY_BYTES = 64 * 1024
#: Labels take about ten times their body's size while they are checked and stored. So the number
#: of bodies in work at the same time is limited for each size. Large bodies wait before they are
#: read.
SMALL_AT_ONCE = 64
LARGE_AT_ONCE = 4
#: For one publisher, so that a publisher with many large bodies leaves room for others.
LARGE_OF_ONE_AT_ONCE = 2
#: Accepted codings of a body, not combined (RFC 9110, section 8.4.1).
CODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
OFF = "publishing is off: this server was started without a publish token"


class PublishHandler:
    """Answers `POST /labels`. Without a publish token publishing is off."""

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
        #: By publisher. There are at most as many publishers as tokens.
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
            # A body that waits here stays at its sender, except what the kernel and aiohttp buffer.
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
            # A byte order mark is ignored (RFC 8259, section 8.1).
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
    """Return the body. Raises RequestTimeout when the body is incomplete after `seconds`.

    aiohttp itself waits for a body without a time limit. For a body over `client_max_size` aiohttp
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
    """Raise UnsupportedMediaType when the body has a coding that is not accepted."""
    given = ", ".join(request.headers.getall(hdrs.CONTENT_ENCODING, [])).strip().lower()
    if given not in CODINGS:
        raise UnsupportedMediaType(
            f"Content-Encoding: got {given[:60]!r}, expected gzip or deflate"
        )


def is_small(request: web.Request) -> bool:
    """Return whether the body is surely small, and not compressed."""
    length = request.content_length
    return (
        length is not None
        and length <= SMALL_BODY_BYTES
        and hdrs.CONTENT_ENCODING not in request.headers
    )


def idempotency_key(request: web.Request, publisher: str) -> bytes | None:
    """Return a hash of the request's Idempotency-Key and its publisher. None: no such header.

    Two publishers may choose the same key, so the hash includes the publisher.
    """
    given = request.headers.getall(IDEMPOTENCY_KEY, [])
    if not given:
        return None
    if len(given) > 1 or not 1 <= len(given[0]) <= KEY_MAX_CHARS or not given[0].isascii():
        raise InvalidRequest(
            f"{IDEMPOTENCY_KEY}: expected once, 1 to {KEY_MAX_CHARS} ASCII characters"
        )
    return hashlib.sha256(f"{publisher}\0{given[0]}".encode()).digest()
