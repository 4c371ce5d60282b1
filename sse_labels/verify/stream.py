"""Verifies an event stream: reads it from its cursor to its head, or until `stop`.

Promises: no input of a server causes an exception, or keeps the verification below the head
forever. The first reading may be stopped at any time, and all events read until then are checked
completely.
Does not belong here: the checks (`continuity`, `crosscheck`), connections (`client`).
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from typing import Any

import httpx

from sse_labels.client.answers import object_in
from sse_labels.client.event_reader import SILENCE_SECONDS, EventReader, Opened, client_of
from sse_labels.client.event_stream import Block
from sse_labels.client.retries import Refused, Retries
from sse_labels.protocol.seq import number_in
from sse_labels.verify.continuity import Event
from sse_labels.verify.crosscheck import (
    MORE_MAX_LABELS,
    PAGE_LABELS,
    Again,
    CrossCheck,
    NotCompared,
)
from sse_labels.verify.findings import Kind
from sse_labels.verify.queries import LabelQueries
from sse_labels.verify.report import Progress, Report, Wanted

#: The most events of a part that is read again: more than the labels it is compared with.
AGAIN_MAX_EVENTS = 2 * (PAGE_LABELS + MORE_MAX_LABELS)


class StreamRun:
    """Verifies one event stream."""

    def __init__(self, wanted: Wanted) -> None:
        self._follow = wanted.follow
        self._say = wanted.say
        self._report = report = Report(wanted)
        self._findings, self._continuity = report.findings, report.continuity
        self._client = client_of(wanted.token, wanted.tls)
        retries = Retries(wanted.retry_seconds)
        self._reader = EventReader(self._client, wanted.url, wanted.cursor, retries, wanted.say)
        self._again = StreamAgain(self._client, wanted.url, wanted.retry_seconds)
        self._queries = LabelQueries(self._client, wanted.url, wanted.retry_seconds)
        if not report.not_compared:
            report.crosscheck = CrossCheck(
                wanted.cursor, self._queries.page, self._again.after, report.findings, time.sleep
            )
        self._epoch: str | None = None
        self._last_id = ""
        self._following = False
        self._taking = False
        self._progress = Progress(report.continuity, wanted.say)

    def run(self) -> Report:
        """Do both readings, and return the report. Raises Refused when no stream ever opened."""
        report, crosscheck = self._report, self._report.crosscheck
        with self._client:
            try:
                with suppress(KeyboardInterrupt):
                    self._read()
            except Refused as error:
                if self._epoch is None:
                    raise
                self._findings.add(Kind.STREAM, str(error))
            report.continuity.close()
            if crosscheck is not None:
                crosscheck.compare(report.continuity.position)
                if not (report.interrupted and crosscheck.ended):
                    # Not after an interrupt with a failed comparison: the user would wait again.
                    crosscheck.read_holes(report.continuity.holes)
        return report

    def stop(self) -> None:
        """End the first reading after the current event. A signal handler calls this once.

        The events read so far are still compared, without waiting for a server.
        """
        self._again.retry_seconds = self._queries.retry_seconds = 0.0
        self._report.interrupted = True
        if not self._taking:
            raise KeyboardInterrupt

    def _read(self) -> None:
        with closing(iter(self._reader)) as blocks:
            for block in blocks:
                if isinstance(block, Opened):
                    self._opened(block)
                elif block.event == "error" and block.data is not None:
                    self._continuity.ended(block.data)
                else:
                    self._take(block)
                    if self._is_done():
                        return

    def _opened(self, opened: Opened) -> None:
        if self._epoch is None:
            if opened.head is None and not self._follow:
                raise Refused(f"{self._reader.place} does not send its head (no Sse-Labels-Head)")
            self._report.head, self._epoch = opened.head, opened.epoch
        else:
            self._continuity.reconnects += 1
            if opened.epoch != self._epoch:
                text = f"the epoch is {opened.epoch!r}, it was {self._epoch!r}"
                raise Refused(f"{text}: seqs name other labels now")
        self._last_id = str(self._continuity.position)
        self._progress.advanced = time.monotonic()

    def _take(self, event: Block) -> None:
        self._taking = True
        continuity, crosscheck = self._continuity, self._report.crosscheck
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
        if self._report.interrupted:
            raise KeyboardInterrupt
        if crosscheck is not None:
            crosscheck.compare_when_full()

    def _is_done(self) -> bool:
        if self._findings.hopeless:
            raise Refused("given up: too much of it is wrong")
        head = self._report.head
        at_head = head is not None and self._continuity.position >= head
        if self._follow and at_head and not self._following:
            self._following = True
            self._say(f"read up to the head, seq {head}; following until Ctrl-C")
        silent = self._progress.silent_seconds()
        if not self._follow and not at_head and silent > SILENCE_SECONDS:
            where = f"at seq {self._continuity.position}, below the head {head}"
            raise Refused(f"no event came for {SILENCE_SECONDS:g} s {where}")
        return at_head and not self._follow


class StreamAgain:
    """Reads parts of the stream again."""

    def __init__(self, client: httpx.Client, url: httpx.URL, retry_seconds: float) -> None:
        self._client = client
        self._url = url
        self.retry_seconds = retry_seconds

    def after(self, cursor: int, until: int) -> Again:
        """Return the events in `(cursor, until]`, or the first `AGAIN_MAX_EVENTS` of them."""
        events: list[Event] = []
        epoch = ""
        deadline = time.monotonic() + SILENCE_SECONDS
        reader = EventReader(self._client, self._url, cursor, Retries(self.retry_seconds))
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
        return Again(events, keeps_rows=bool(epoch))


def label_in(data: str) -> Any:
    """Return the label of an event, or the value in its place."""
    labels = (object_in(data) or {}).get("labels")
    return labels[0] if isinstance(labels, list) and len(labels) == 1 else labels
