"""The first reading: an event stream from its cursor to its head, or as long as one likes.

Promises: a lost connection is made anew after the last id; nothing that a server sends is an
error of ours, or keeps us for ever below its head.
Stands before `continuity` and `crosscheck`, which judge what comes here.
Does not belong here: what is right and wrong; how a stream is opened (`event_stream`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from sse_labels.client.event_stream import Block
from sse_labels.verification.continuity import Continuity
from sse_labels.verification.crosscheck import CrossCheck
from sse_labels.verification.event_stream import HINT_MAX_SECONDS, EventStreams, Opened, ended
from sse_labels.verification.findings import Findings, Kind
from sse_labels.verification.patience import (
    PROGRESS_SECONDS,
    SILENCE_SECONDS,
    Lost,
    Patience,
    Refused,
    Unavailable,
)


class StreamReading:
    """The first reading."""

    def __init__(
        self,
        streams: EventStreams,
        continuity: Continuity,
        crosscheck: CrossCheck | None,
        findings: Findings,
        *,
        follow: bool,
        retry_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._streams = streams
        self._continuity = continuity
        self._crosscheck = crosscheck
        self._findings = findings
        self._follow = follow
        self._patience = Patience(retry_seconds)
        self._say = say
        #: What the server's newest seq was at the first opening.
        self.head: int | None = None
        self.interrupted = False
        self._epoch = ""
        self._reached = False
        self._following = False
        self._taking = False
        self._position = continuity.position
        self._advanced = self._told = time.monotonic()

    def run(self) -> None:
        """Read to the head, or until `stop`; raise Refused when there never was a stream."""
        with suppress(KeyboardInterrupt):
            self._read()

    def stop(self) -> None:
        """End it, but not in the midst of an event; to be called by a signal."""
        self.interrupted = True
        if not self._taking:
            raise KeyboardInterrupt

    def _read(self) -> None:
        while True:
            try:
                try:
                    if self._connection():
                        return
                    lost = Lost("the stream ended")
                except Lost as error:
                    if not self._reached and not isinstance(error, Unavailable):
                        # An address that is wrong does not mend by waiting.
                        raise Refused(f"{self._streams.place}: {error}") from None
                    lost = error
                wait = self._patience.wait_seconds(lost)
            except Refused as error:
                if not self._reached:
                    raise
                self._findings.add(Kind.STREAM, str(error))
                return
            self._say(f"{lost}; reconnecting after seq {self._continuity.position} in {wait:.1f} s")
            time.sleep(wait)

    def _connection(self) -> bool:
        """Read one response; return whether the end that was asked for is reached."""
        last_id = str(self._continuity.position)
        with self._streams.open(self._continuity.position) as stream:
            opened = False
            for event in stream.events:
                if stream.events.retry_seconds is not None:
                    hint = min(stream.events.retry_seconds, HINT_MAX_SECONDS)
                    self._patience.hint_seconds = hint
                if event.event == "error" and event.data is not None:
                    # Also how a full server answers whoever wants an event stream.
                    self._continuity.ended(event.data)
                    raise ended(event.data)
                if not opened:
                    self._opened(stream)
                    opened = True
                self._take(event, new_id=event.id != last_id)
                last_id = event.id
                if self.interrupted:
                    raise KeyboardInterrupt
                if self._crosscheck is not None:
                    self._crosscheck.compare_when_full()
                if self._is_done():
                    return True
                self._look_at_the_clock()
        return False

    def _opened(self, stream: Opened) -> None:
        if self._reached:
            self._continuity.reconnects += 1
            if stream.epoch != self._epoch:
                text = f"the epoch is {stream.epoch!r}, it was {self._epoch!r}"
                raise Refused(f"{text}: seqs name other labels now")
        elif stream.head is None and not self._follow:
            raise Refused(f"{self._streams.place} does not tell its head (no Sse-Labels-Head)")
        else:
            self.head = stream.head
            self._epoch = stream.epoch
            self._reached = True
        self._patience.opened()
        self._advanced = time.monotonic()

    def _take(self, event: Block, *, new_id: bool) -> None:
        self._taking = True
        continuity, crosscheck = self._continuity, self._crosscheck
        if not event.data and (event.data is None or event.event == "message"):
            if event.id and new_id:
                continuity.moved(event.id)
        elif event.event == "info":
            floor = continuity.info(event.data)
            if floor is not None and crosscheck is not None:
                crosscheck.skip(floor)
            if event.id and new_id:
                continuity.moved(event.id)
        elif event.event != "message":
            text = f"after seq {continuity.position}: an event of the type {event.event[:60]!r}"
            self._findings.add(Kind.EVENT, text)
        else:
            passed = continuity.event(event.id, event.data)
            if passed is not None and crosscheck is not None:
                crosscheck.take(passed)
        self._taking = False

    def _is_done(self) -> bool:
        if self._findings.hopeless:
            raise Refused("given up: too much of it is wrong")
        at_head = self.head is not None and self._continuity.position >= self.head
        if self._follow and at_head and not self._following:
            self._following = True
            self._say(f"read up to the head, seq {self.head}; following until Ctrl-C")
        return at_head and not self._follow

    def _look_at_the_clock(self) -> None:
        """Say how far it is, from time to time; raise Refused when nothing moves for long."""
        now = time.monotonic()
        if self._continuity.position != self._position:
            self._position = self._continuity.position
            self._advanced = now
            self._patience.progress()
        elif not self._follow and now - self._advanced > SILENCE_SECONDS:
            where = f"at seq {self._position}, below the head {self.head}"
            raise Refused(f"no event came for {SILENCE_SECONDS:g} s {where}")
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            self._say(f"read up to seq {self._position}, the head was {self.head}")
