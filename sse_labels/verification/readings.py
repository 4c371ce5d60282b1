"""The first reading: a stream from its cursor to its head, or as long as one likes.

Promises: nothing that a server sends is an error of ours, or keeps us for ever below its head.
Does not belong here: what is right and wrong (`continuity`); connections (`client`).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import Any

import httpx

from sse_labels.client.answers import object_in, place_of, words
from sse_labels.client.event_reader import SILENCE_SECONDS, EventReader, Opened
from sse_labels.client.event_stream import MESSAGE_MAX_BYTES, Block
from sse_labels.client.label_socket import LabelSocket, label_socket
from sse_labels.client.retries import (
    BEGAN_ANEW,
    TOKEN_HINT,
    Lost,
    Patience,
    Refused,
    Unavailable,
)
from sse_labels.formats import expires_at
from sse_labels.seq import number_in
from sse_labels.verification.continuity import Continuity, Event
from sse_labels.verification.crosscheck import (
    MORE_MAX_LABELS,
    PAGE_LABELS,
    Again,
    CrossCheck,
    NotCompared,
)
from sse_labels.verification.findings import Findings, Kind
from sse_labels.xrpc import MalformedMessage

#: Time between two lines that say how far it is.
PROGRESS_SECONDS = 10.0
#: Events of a part that is read again: more than there are labels to compare it with.
AGAIN_MAX_EVENTS = 2 * (PAGE_LABELS + MORE_MAX_LABELS)


class StreamReading:
    """The first reading of an event stream."""

    def __init__(
        self,
        reader: EventReader,
        continuity: Continuity,
        crosscheck: CrossCheck | None,
        findings: Findings,
        *,
        follow: bool,
        say: Callable[[str], None],
    ) -> None:
        self._reader = reader
        self._continuity = continuity
        self._crosscheck = crosscheck
        self._findings = findings
        self._follow = follow
        self._say = say
        #: What the server's newest seq was at the first opening.
        self.head: int | None = None
        self.interrupted = False
        self._epoch: str | None = None
        self._last_id = ""
        self._following = False
        self._taking = False
        self._progress = Progress(continuity, say)

    def run(self) -> None:
        """Read to the head, or until `stop`; raise Refused when there never was a stream."""
        try:
            with suppress(KeyboardInterrupt), closing(iter(self._reader)) as blocks:
                for block in blocks:
                    if isinstance(block, Opened):
                        self._opened(block)
                    elif block.event == "error" and block.data is not None:
                        self._continuity.ended(block.data)
                    else:
                        self._take(block)
                        if self._is_done():
                            return
        except Refused as error:
            if self._epoch is None:
                raise
            self._findings.add(Kind.STREAM, str(error))

    def stop(self) -> None:
        """End it, but not in the midst of an event; to be called by a signal."""
        self.interrupted = True
        if not self._taking:
            raise KeyboardInterrupt

    def _opened(self, opened: Opened) -> None:
        if self._epoch is None:
            if opened.head is None and not self._follow:
                raise Refused(f"{self._reader.place} does not tell its head (no Sse-Labels-Head)")
            self.head, self._epoch = opened.head, opened.epoch
        else:
            self._continuity.reconnects += 1
            if opened.epoch != self._epoch:
                text = f"the epoch is {opened.epoch!r}, it was {self._epoch!r}"
                raise Refused(f"{text}: seqs name other labels now")
        self._last_id = str(self._continuity.position)
        self._progress.advanced = time.monotonic()

    def _take(self, event: Block) -> None:
        self._taking = True
        continuity, crosscheck = self._continuity, self._crosscheck
        new_id = event.id and event.id != self._last_id
        self._last_id = event.id
        if not event.data and (event.data is None or event.event == "message"):
            if new_id:
                continuity.moved(event.id)
        elif event.event == "info":
            floor = continuity.info(event.data)
            if floor is not None and crosscheck is not None:
                crosscheck.skip(floor)
            if new_id:
                continuity.moved(event.id)
        elif event.event != "message":
            text = f"after seq {continuity.position}: an event of the type {event.event[:60]!r}"
            self._findings.add(Kind.EVENT, text)
        else:
            passed = continuity.event(event.id, event.data)
            if passed is not None and crosscheck is not None:
                crosscheck.take(passed)
        self._reader.cursor = continuity.position
        self._taking = False
        if self.interrupted:
            raise KeyboardInterrupt
        if crosscheck is not None:
            crosscheck.compare_when_full()

    def _is_done(self) -> bool:
        if self._findings.hopeless:
            raise Refused("given up: too much of it is wrong")
        at_head = self.head is not None and self._continuity.position >= self.head
        if self._follow and at_head and not self._following:
            self._following = True
            self._say(f"read up to the head, seq {self.head}; following until Ctrl-C")
        silent = self._progress.silent_seconds()
        if not self._follow and not at_head and silent > SILENCE_SECONDS:
            where = f"at seq {self._continuity.position}, below the head {self.head}"
            raise Refused(f"no event came for {SILENCE_SECONDS:g} s {where}")
        return at_head and not self._follow


class StreamAgain:
    """Reads parts of the same stream again."""

    def __init__(self, client: httpx.Client, url: httpx.URL, retry_seconds: float) -> None:
        self._client = client
        self._url = url
        self.retry_seconds = retry_seconds

    def after(self, cursor: int, until: int) -> Again:
        """Return what is in `(cursor, until]`, the first events if there are many."""
        events: list[Event] = []
        epoch = ""
        deadline = time.monotonic() + SILENCE_SECONDS
        reader = EventReader(self._client, self._url, cursor, Patience(self.retry_seconds))
        try:
            with closing(iter(reader)) as blocks:
                for block in blocks:
                    if isinstance(block, Opened):
                        epoch = block.epoch
                    elif block.event != "error" and (seq := number_in(block.id)) is not None:
                        if block.event == "message" and block.data and cursor < seq <= until:
                            events.append(Event(seq, label_in(block.data)))
                        if seq >= until or len(events) >= AGAIN_MAX_EVENTS:
                            break
                        reader.cursor = seq
                    if time.monotonic() > deadline:
                        raise NotCompared(f"the second reading did not get to seq {until}")
        except Refused as error:
            raise NotCompared(str(error)) from None
        return Again(events, has_epoch=bool(epoch))


class SocketReading:
    """The one reading of a subscription over a WebSocket; the lexicon promises no second one."""

    def __init__(
        self,
        url: httpx.URL,
        continuity: Continuity,
        findings: Findings,
        *,
        token: str | None,
        tls: ssl.SSLContext,
        follow: bool,
        quiet_seconds: float,
        retry_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._url = url
        self._continuity = continuity
        self._findings = findings
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._tls = tls
        self._follow = follow
        self._quiet_seconds = quiet_seconds
        self._patience = Patience(retry_seconds)
        self._say = say
        self.interrupted = False
        self._reached = False
        self._reading: asyncio.Task[None] | None = None
        self._begun = time.time()
        #: The newest seq when it began; sse-labels tells it, the lexicon does not.
        self._head: int | None = None
        self._live = False
        self._progress = Progress(continuity, say)

    async def run(self) -> None:
        """Read history, or until `stop`; raise Refused when nobody ever answered.

        History ends at the head where one is told, else with a label that was made since it began,
        or when all is quiet.
        """
        self._reading = asyncio.create_task(self._read(), name="reading a subscription")
        try:
            await self._reading
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
        except Refused as error:
            if not self._reached:
                raise Refused(f"{place_of(self._url)}: {error}") from None
            self._findings.add(Kind.STREAM, str(error))

    def stop(self) -> None:
        """End it; a message is taken in one step and not cut."""
        self.interrupted = True
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        while True:
            position = self._continuity.position
            try:
                async with label_socket(
                    str(self._url.copy_set_param("cursor", str(position))),
                    message_max_bytes=MESSAGE_MAX_BYTES,
                    tls=self._tls,
                    headers=self._headers,
                    token_hint=TOKEN_HINT,
                ) as socket:
                    return await self._connection(socket)
            except Lost as error:
                if not self._reached and not isinstance(error, Unavailable):
                    # An address that is wrong does not mend by waiting.
                    raise Refused(str(error)) from None
                if self._continuity.position != position:
                    self._patience.progress()
                wait = self._patience.wait_seconds(error)
                where = f"after seq {self._continuity.position}"
                self._say(f"{error}; reconnecting {where} in {wait:.1f} s")
            await asyncio.sleep(wait)

    async def _connection(self, socket: LabelSocket) -> None:
        """Read one socket until history is over; raise Lost or Refused."""
        if self._reached:
            self._continuity.reconnects += 1
        else:
            self._reached = True
            self._head = number_in(socket.headers.get("Sse-Labels-Head", ""))
        self._patience.opened()
        self._live = self._at_head()
        heard = asyncio.get_running_loop().time()
        while self._follow or not self._live:
            try:
                async with asyncio.timeout_at(
                    None if self._follow else heard + self._quiet_seconds
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
        """Say whether a label was made since this began; one from the future was not."""
        labels = body.get("labels")
        made = [each.get("cts") for each in labels if isinstance(each, dict)] if labels else []
        times = [expires_at(cts) for cts in made if isinstance(cts, str)]
        now = time.time()
        return any(at is not None and self._begun < at <= now for at in times)


class Progress:
    """Says how far it is, from time to time."""

    def __init__(self, continuity: Continuity, say: Callable[[str], None]) -> None:
        self._continuity = continuity
        self._say = say
        self._position = continuity.position
        self._told = self.advanced = time.monotonic()

    def silent_seconds(self) -> float:
        """Return for how long the position has not moved."""
        now = time.monotonic()
        if self._continuity.position != self._position:
            self._position = self._continuity.position
            self.advanced = now
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            self._say(f"read up to seq {self._position}")
        return now - self.advanced


def label_in(data: str) -> Any:
    """Return the label of an event, or what stands in its place."""
    labels = (object_in(data) or {}).get("labels")
    return labels[0] if isinstance(labels, list) and len(labels) == 1 else labels
