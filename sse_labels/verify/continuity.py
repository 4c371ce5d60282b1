"""The first reading: checks the order of events, their format, and each label.

Promises: any input becomes a finding or a count, and never an exception. Memory does not grow with
the stream. An event that continues the stream is returned, for the comparison with the second
reading.
Does not belong here: sockets (`client`), the second reading (`crosscheck`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ujson

from sse_labels.client.answers import object_in, words
from sse_labels.errors import InvalidLabel
from sse_labels.protocol.formats import shown
from sse_labels.protocol.label import Label, parse_label
from sse_labels.protocol.seq import SEQ_MAX, number_in
from sse_labels.protocol.signatures import SourceKeys, Verdict
from sse_labels.protocol.xrpc import MalformedMessage, Message, decode, json_label
from sse_labels.verify.findings import Findings, Kind

#: The most holes that are kept. More holes are only counted.
HOLES_MAX = 100
#: The most sources with their own signature counts. All other sources share one count.
SOURCES_MAX = 1000
OTHER_SOURCES = "other sources"
#: The most news whose text is kept.
NEWS_MAX = 20


class Event(NamedTuple):
    """One event as received. Its label may be any JSON value."""

    seq: int
    label: Any


class Hole(NamedTuple):
    """Missing seqs: those after `after`, up to `until`."""

    after: int
    until: int


class Continuity:
    """Checks the input of one stream, over all its connections."""

    def __init__(self, cursor: int, keys: SourceKeys | None, findings: Findings) -> None:
        self._keys = keys
        self._findings = findings
        #: The stream's position: the last seq, with or without an event.
        self.position = cursor
        #: The seq of the last event, or the start. A hole begins after it.
        self._edge = cursor
        self.events = 0
        self.labels = 0
        self.malformed = 0
        self.reconnects = 0
        self.first: int | None = None
        self.last: int | None = None
        self.holes: list[Hole] = []
        self.hole_count = 0
        #: The number of seqs in all holes.
        self.hole_seqs = 0
        self.news: list[str] = []
        #: The number of signatures with each verdict, by source.
        self.signatures: dict[str, dict[Verdict, int]] = {}

    # An event stream

    def event(self, id_text: str, data: str) -> Event | None:
        """Check an event. Return the event when it continues the stream."""
        self.events += 1
        seq = number_in(id_text)
        if seq is None:
            self._wrong(Kind.EVENT, f"the event's id is no seq: {shown(id_text)}")
        where = f"seq {self._name(seq)}"
        try:
            body = ujson.loads(data)
        except (ValueError, RecursionError):
            self._wrong(Kind.EVENT, f"{where}: its data is not JSON: {shown(data)}")
            body = {}
        else:
            if not isinstance(body, dict):
                self._wrong(Kind.EVENT, f"{where}: its data is {shown(body)}, expected an object")
                body = {}
            elif type(body.get("seq")) is not int or body["seq"] != seq:
                found_seq = shown(body.get("seq"))
                self._wrong(Kind.EVENT, f"{where}: the seq in its data is {found_seq}")
            labels = body.get("labels")
            if not isinstance(labels, list) or len(labels) != 1:
                count = len(labels) if isinstance(labels, list) else "no list of"
                self._wrong(Kind.EVENT, f"{where}: {count} labels, expected one")
        found = body.get("labels")
        if isinstance(found, list):
            for label in found:
                self._label(where, label)
        if seq is None:
            return None
        alone = found[0] if isinstance(found, list) and len(found) == 1 else found
        return self._passed(Event(seq, alone))

    def moved(self, id_text: str) -> None:
        """Move to an id without an event: all events up to the id were sent or are hidden."""
        seq = number_in(id_text)
        if seq is None:
            self._wrong(Kind.EVENT, f"an id without an event is no seq: {shown(id_text)}")
        elif seq < self.position:
            self._wrong(Kind.ORDER, f"the position went back: {seq} came after {self.position}")
        else:
            self.position = seq

    def info(self, data: str) -> int | None:
        """Check news. Return the floor when the stream continues from the floor."""
        news = object_in(data)
        if news is None:
            self._wrong(Kind.EVENT, f"news that is no JSON object: {shown(data)}")
            return None
        if news.get("name") != "StreamOpened":
            return self._news(news)
        started = news.get("cursor")
        if started != self.position:
            text = f"asked for what comes after {self.position}, it streams after {shown(started)}"
            self._wrong(Kind.STREAM, text)
        return None

    def ended(self, data: str) -> None:
        """Check the `error` event that ends a connection."""
        said = object_in(data) or {}
        claimed = said.get("cursor")
        if type(claimed) is int and claimed > self.position:
            text = f"the server says that it sent all up to {shown(claimed)}"
            text += f", {self.position} came last"
            self._wrong(Kind.LOST, text)

    # A WebSocket

    def frame(self, payload: bytes) -> Message | None:
        """Check the payload of one binary frame. Return its message. None: it is malformed."""
        try:
            message = decode(payload)
        except MalformedMessage as error:
            self._wrong(Kind.EVENT, f"a frame after seq {self.position}: {error}")
            return None
        if message.type == "#labels":
            self._labels(message.body)
        elif message.type == "#info":
            self._news(message.body)
        return message

    def _labels(self, body: dict[str, Any]) -> None:
        self.events += 1
        seq, labels = body.get("seq"), body.get("labels")
        if type(seq) is not int or not 0 <= seq <= SEQ_MAX:
            self._wrong(Kind.EVENT, f"the seq of #labels is {shown(seq)}")
            seq = None
        where = f"seq {self._name(seq)}"
        if isinstance(labels, list):
            for label in labels:
                self._label(where, json_label(label))
        else:
            self._wrong(Kind.EVENT, f"{where}: labels is {shown(labels)}, expected an array")
        if seq is not None:
            self._passed(Event(seq, None))

    # Both

    def close(self) -> None:
        """Note a hole between the last event and the position."""
        if self.position > self._edge:
            self._hole(self.position)
            self._edge = self.position

    def _passed(self, event: Event) -> Event | None:
        """Move to an event, and return it. None: its seq is not after the position."""
        if event.seq <= self.position:
            again = "a second time, " if event.seq == self._edge else ""
            self._wrong(Kind.ORDER, f"seq {event.seq} came {again}after {self.position}")
            return None
        if event.seq > self._edge + 1:
            self._hole(event.seq - 1)
        self.position = self._edge = self.last = event.seq
        if self.first is None:
            self.first = event.seq
        return event

    def _hole(self, until: int) -> None:
        self.hole_count += 1
        self.hole_seqs += until - self._edge
        if len(self.holes) < HOLES_MAX:
            self.holes.append(Hole(self._edge, until))

    def _news(self, news: dict[str, Any]) -> int | None:
        if len(self.news) < NEWS_MAX and news.get("name") != "CaughtUp":
            said = (news.get("name"), news.get("message"))
            self.news.append(": ".join(words(part) for part in said if part is not None))
        floor = news.get("floor")
        if news.get("name") != "OutdatedCursor" or type(floor) is not int:
            return None
        # The seqs below the floor are not a hole: the server says that it deleted them.
        floor = min(floor, SEQ_MAX)
        self._edge = max(self._edge, floor - 1)
        return floor

    def _label(self, where: str, obj: object) -> None:
        self.labels += 1
        try:
            label = parse_label(obj)
        except InvalidLabel as error:
            self.malformed += 1
            self._wrong(Kind.MALFORMED, f"{where}: {error}")
            return
        verdict = self._verdict(label)
        known = label.src in self.signatures or len(self.signatures) < SOURCES_MAX
        source = label.src if known else OTHER_SOURCES
        if source not in self.signatures:
            self.signatures[source] = dict.fromkeys(Verdict, 0)
        self.signatures[source][verdict] += 1
        if verdict is Verdict.INVALID:
            what = f"{shown(label.val)} of {shown(label.uri)}"
            text = f"{where}: the signature of {what} is not one of {shown(label.src)}"
            self._wrong(Kind.SIGNATURE, text)

    def _verdict(self, label: Label) -> Verdict:
        if self._keys is not None:
            return self._keys.check(label)
        return Verdict.UNKNOWN if label.sig else Verdict.UNSIGNED

    def _name(self, seq: int | None) -> str:
        return f"after {self.position}" if seq is None else str(seq)

    def _wrong(self, kind: Kind, text: str) -> None:
        self._findings.add(kind, text)
