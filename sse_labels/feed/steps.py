"""The steps of a stream: what an outbox yields, one after the other.

Does not belong here: how a step is written (`web`), when it comes (`backfill`, `outbox`).
"""

from __future__ import annotations

from typing import NamedTuple

from sse_labels.feed.chunk import Chunk
from sse_labels.protocol.notice import Notice


class Events(NamedTuple):
    """Chunks to write, in order; they continue what was yielded before."""

    chunks: list[Chunk]


class Outdated(NamedTuple):
    """What follows starts at `floor`: events between the cursor and that seq are gone."""

    cursor: int
    floor: int


class CaughtUp(NamedTuple):
    """History is done; what follows is live."""


class SnapshotComplete(NamedTuple):
    """What was in force as of `seq` has been yielded; what follows are all events after it."""

    seq: int


class Expired(NamedTuple):
    """Labels that have expired, in order; each of them came before, or will not come."""

    notices: list[Notice]


class Silence(NamedTuple):
    """Nothing to write for `heartbeat_seconds`."""


Step = Events | Outdated | CaughtUp | SnapshotComplete | Expired | Silence
