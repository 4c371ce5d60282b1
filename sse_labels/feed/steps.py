"""The steps of a stream: an outbox yields them, and `web` writes them to the socket."""

from __future__ import annotations

from typing import NamedTuple

from sse_labels.feed.chunk import Chunk
from sse_labels.protocol.notice import Notice


class Events(NamedTuple):
    """Chunks to write, in order. They continue the events yielded before."""

    chunks: list[Chunk]


class Outdated(NamedTuple):
    """The next events start at `floor`: events between the cursor and the floor were deleted."""

    cursor: int
    floor: int


class CaughtUp(NamedTuple):
    """History is complete. The next events are live."""


class SnapshotComplete(NamedTuple):
    """All labels in force as of `seq` have been yielded. All events after `seq` follow."""

    seq: int


class Expired(NamedTuple):
    """Labels that have expired, in order. Each label came before its notice, or never comes."""

    notices: list[Notice]


class Silence(NamedTuple):
    """There was nothing to write for `heartbeat_seconds`."""


Step = Events | Outdated | CaughtUp | SnapshotComplete | Expired | Silence
