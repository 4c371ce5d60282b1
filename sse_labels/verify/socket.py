"""Verifies `subscribeLabels` of any labeler over a WebSocket.

Promises: no input of a server causes an exception, and memory is bounded by one message.
There is no second reading, because the lexicon promises none.
Does not belong here: the checks (`continuity`), the socket (`client`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from sse_labels.client.answers import place_of, words
from sse_labels.client.event_stream import MESSAGE_MAX_BYTES
from sse_labels.client.label_socket import LabelSocket, label_socket
from sse_labels.client.retries import (
    BEGAN_ANEW,
    TOKEN_HINT,
    Lost,
    Refused,
    Retries,
    Unavailable,
)
from sse_labels.protocol.formats import expires_at
from sse_labels.protocol.seq import number_in
from sse_labels.protocol.xrpc import MalformedMessage
from sse_labels.verify.findings import Kind
from sse_labels.verify.report import Progress, Report, Wanted


class SocketRun:
    """Verifies one subscription."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._report = report = Report(wanted)
        self._findings, self._continuity = report.findings, report.continuity
        self._retries = Retries(wanted.retry_seconds)
        self._reached = False
        self._reading: asyncio.Task[None] | None = None
        self._begun = time.time()
        #: The newest seq at the begin. Only sse-labels sends it, the lexicon has no such field.
        self._head: int | None = None
        self._live = False
        self._progress = Progress(report.continuity, wanted.say)

    async def run(self) -> Report:
        """Read history, or until `stop`. Raises Refused when the server never answered.

        History ends at the head if the server sends one. Otherwise it ends with a label made after
        the begin of this run, or after `quiet_seconds` without a message.
        """
        self._reading = asyncio.create_task(self._read(), name="reading a subscription")
        try:
            await self._reading
        except asyncio.CancelledError:
            if not self._report.interrupted:
                raise
        except Refused as error:
            if not self._reached:
                raise Refused(f"{place_of(self._wanted.url)}: {error}") from None
            self._findings.add(Kind.STREAM, str(error))
        self._continuity.close()
        return self._report

    def stop(self) -> None:
        """End the run. The cancellation comes between two messages."""
        self._report.interrupted = True
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        wanted = self._wanted
        while True:
            position = self._continuity.position
            try:
                async with label_socket(
                    str(wanted.url.copy_set_param("cursor", str(position))),
                    message_max_bytes=MESSAGE_MAX_BYTES,
                    tls=wanted.tls,
                    headers=wanted.headers,
                    token_hint=TOKEN_HINT,
                ) as socket:
                    return await self._connection(socket)
            except Lost as error:
                if not self._reached and not isinstance(error, Unavailable):
                    # Waiting does not fix a wrong address.
                    raise Refused(str(error)) from None
                if self._continuity.position != position:
                    self._retries.progress()
                wait = self._retries.wait_seconds(error)
                where = f"after seq {self._continuity.position}"
                wanted.say(f"{error}; reconnecting {where} in {wait:.1f} s")
            await asyncio.sleep(wait)

    async def _connection(self, socket: LabelSocket) -> None:
        """Read one socket until the end of history. Raises Lost or Refused."""
        if self._reached:
            self._continuity.reconnects += 1
        else:
            self._reached = True
            self._head = number_in(socket.headers.get("Sse-Labels-Head", ""))
        self._retries.opened()
        self._live = self._at_head()
        heard = asyncio.get_running_loop().time()
        while self._wanted.follow or not self._live:
            try:
                async with asyncio.timeout_at(
                    None if self._wanted.follow else heard + self._wanted.quiet_seconds
                ):
                    payload = await socket.next()
            except TimeoutError:
                return
            except MalformedMessage as error:
                text = f"a frame after seq {self._continuity.position}: {error}"
                self._findings.add(Kind.EVENT, text)
                payload = None
            if payload is not None:
                heard = asyncio.get_running_loop().time()
                self._take(payload)
            if self._findings.hopeless:
                raise Refused("given up: too much of it is wrong")
            self._progress.silent_seconds()

    def _take(self, payload: bytes) -> None:
        said = self._continuity.frame(payload)
        if said is not None and said.type is None:
            name = words(said.body.get("error"))
            text = f"it ended the stream: {name}: {words(said.body.get('message'))}"
            raise Refused(text) if name in BEGAN_ANEW else Lost(text)
        if said is not None and said.type == "#labels":
            self._live = self._is_new(said.body) if self._head is None else self._at_head()

    def _at_head(self) -> bool:
        return self._head is not None and self._continuity.position >= self._head

    def _is_new(self, body: Mapping[str, Any]) -> bool:
        """Return whether a label was made after this run began, and not in the future."""
        labels = body.get("labels")
        made = [each.get("cts") for each in labels if isinstance(each, dict)] if labels else []
        times = [expires_at(cts) for cts in made if isinstance(cts, str)]
        now = time.time()
        return any(at is not None and self._begun < at <= now for at in times)
