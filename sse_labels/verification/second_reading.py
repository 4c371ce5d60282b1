"""The second reading: parts of the same event stream once more.

Promises: no more than a part is kept, and none is waited for for ever; what cannot be had is
`NotCompared`.
Stands before `crosscheck`, which asks for the parts.
Does not belong here: comparing; how a stream is opened (`event_stream`).
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from sse_labels.errors import InvalidRequest
from sse_labels.filters import parse_filter
from sse_labels.seq import number_in
from sse_labels.verification.continuity import Event, object_in
from sse_labels.verification.crosscheck import Fate, NotCompared, key_of
from sse_labels.verification.event_stream import EventStreams, ended
from sse_labels.verification.patience import SILENCE_SECONDS, Lost, Patience, Refused

#: Events that are kept; in a hole there should be none.
AGAIN_MAX_EVENTS = 1000


class StreamAgain:
    """The second reading: parts of the same stream."""

    def __init__(self, streams: EventStreams, retry_seconds: float) -> None:
        self._streams = streams
        self.retry_seconds = retry_seconds

    def after(self, cursor: int, until: int) -> list[Event]:
        """Return the events in `(cursor, until]`, the first ones if there are many."""
        return self._read(cursor, until).events

    def fate(self, event: Event) -> Fate:
        """Say what became of an event."""
        key = key_of(event.label)
        filters = None if key is None else filters_for(*key)
        if filters is None:
            part = self._read(event.seq - 1, event.seq)
        else:
            part = self._read(event.seq - 1, None, key, **filters)
        if any(found.seq == event.seq for found in part.events):
            return Fate.THERE
        if part.floor > event.seq:
            return Fate.EXPIRED
        # Only where the server keeps no state, in Ozone's database, may a row move: ours stay.
        return Fate.REPLACED if part.events and not part.epoch else Fate.GONE

    def _read(
        self, cursor: int, until: int | None, key: tuple[Any, ...] | None = None, **filters: str
    ) -> Part:
        patience = Patience(self.retry_seconds)
        try:
            while True:
                try:
                    return self._once(cursor, until, key, filters)
                except Lost as lost:
                    time.sleep(patience.wait_seconds(lost))
        except Refused as error:
            raise NotCompared(str(error)) from None

    def _once(
        self, cursor: int, until: int | None, key: tuple[Any, ...] | None, filters: dict[str, str]
    ) -> Part:
        """Return what is in `(cursor, until]`; without `until`, up to the head, of one key."""
        deadline = time.monotonic() + SILENCE_SECONDS
        with self._streams.open(cursor, **filters) as stream:
            part = Part([], 0, stream.epoch)
            end = until if until is not None else max(stream.head or 0, cursor + 1)
            for event in stream.events:
                if event.event == "error" and event.data is not None:
                    raise ended(event.data)
                if event.event == "info" and event.data is not None:
                    said = object_in(event.data) or {}
                    if type(said.get("floor")) is int:
                        part = part._replace(floor=said["floor"])
                seq = number_in(event.id)
                if seq is not None:
                    if event.event == "message" and event.data and cursor < seq <= end:
                        labels = (object_in(event.data) or {}).get("labels")
                        alone = isinstance(labels, list) and len(labels) == 1
                        found = Event(seq, labels[0] if alone and labels else labels)
                        if key is None or key_of(found.label) == key:
                            part.events.append(found)
                    if seq >= end or len(part.events) >= AGAIN_MAX_EVENTS:
                        return part
                if time.monotonic() > deadline:
                    raise Refused(f"the second reading did not get to seq {end}")
        raise Lost("the stream ended")


class Part(NamedTuple):
    """A part of the stream, read again."""

    events: list[Event]
    #: What the server said its floor is, 0 when it did not.
    floor: int
    epoch: str


def filters_for(src: str, uri: str, cid: str, val: str) -> dict[str, str] | None:
    """Return the filters that let one key pass, and few others; None when there are none."""
    # A star is a pattern's end, wherever it stands in the URI.
    pattern = uri.partition("*")[0] + "*" if "*" in uri else uri
    try:
        parse_filter([src], [pattern], [val])
    except InvalidRequest:
        return None
    return {"sources": src, "uriPatterns": pattern, "values": val}
