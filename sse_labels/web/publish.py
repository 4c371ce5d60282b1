"""`POST /labels`: who may publish, and what a publish request looks like.

Promises: nothing is stored unless the answer is 201; a token is compared in
constant time and never logged.
Stands at the door of the corridor, in front of the publisher.
Does not belong here: what makes a label valid (`labels`), SQL.
"""

from __future__ import annotations

import hashlib
import hmac

import ujson
from aiohttp import hdrs, web

from sse_labels.errors import AuthRequired, Forbidden, InvalidRequest, PayloadTooLarge
from sse_labels.publisher import Publisher
from sse_labels.web.answers import json_response


class PublishHandler:
    """Answers `POST /labels`; without a token publishing is off."""

    def __init__(self, publisher: Publisher, token: str | None, *, max_labels: int) -> None:
        self._publisher = publisher
        self._token = None if token is None else _digest(token)
        self._max_labels = max_labels

    async def handle(self, request: web.Request) -> web.Response:
        """Answer `201 {"seqs": […]}`, in the order of the labels given."""
        self._authorize(request)
        try:
            body = await request.read()
        except web.RequestPayloadError as error:
            raise InvalidRequest(f"the body cannot be decoded: {error}") from None
        labels = self._labels(body)
        return json_response({"seqs": await self._publisher.publish(labels)}, status=201)

    def _authorize(self, request: web.Request) -> None:
        if self._token is None:
            raise Forbidden("publishing is off: this server was started without a publish token")
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise AuthRequired("expected the header Authorization: Bearer <token>")
        # Digests have one length: the time of the comparison tells nothing, not even that.
        if not hmac.compare_digest(_digest(token.strip()), self._token):
            refusal = AuthRequired("this token is not known here")
            refusal.headers = {
                "WWW-Authenticate": 'Bearer realm="sse-labels", error="invalid_token"'
            }
            raise refusal

    def _labels(self, body: bytes) -> list[object]:
        try:
            given = ujson.loads(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the body is not UTF-8: byte {error.start}") from None
        except ValueError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None
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


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
