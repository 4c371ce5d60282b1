"""The signature watch: checks the signatures of new labels, and reports wrong ones.

Promises: no label waits for the check, and no label is held back. Each wrong signature is logged
and counted. If labels come faster than they can be checked, the unchecked labels are counted.
The sequencer passes all new labels to the watch. The publisher, not the watch, refuses labels.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from itertools import islice

from sse_labels.metrics import Metrics
from sse_labels.protocol.label import Label, Row
from sse_labels.protocol.signatures import SourceKeys, Verdict

log = logging.getLogger(__name__)

#: The most labels that wait for the check, at 40 µs each: 4 s of work.
WAITING_MAX_LABELS = 100_000
#: Labels that are checked at once in a thread. The event loop runs meanwhile.
CHECKED_AT_ONCE = 500


class SignatureWatch:
    """Checks the signatures of new labels. `run` is its only task."""

    def __init__(self, keys: SourceKeys, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics
        self._waiting: deque[tuple[int, Label]] = deque()
        self._wake = asyncio.Event()

    def take(self, rows: Sequence[Row]) -> None:
        """Queue these rows for the check."""
        room = WAITING_MAX_LABELS - len(self._waiting)
        self._waiting.extend((row.seq, Label._make(row.columns)) for row in rows[:room])
        self._metrics.count["signatures_unchecked"] += max(0, len(rows) - room)
        self._wake.set()

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = list(islice(self._waiting, CHECKED_AT_ONCE))
                # Checking a signature releases the interpreter's lock.
                wrong = await asyncio.to_thread(self._wrong, batch)
                for _ in batch:
                    self._waiting.popleft()
                self._metrics.count["signatures_invalid"] += len(wrong)
                for seq, label in wrong:
                    log.warning(
                        "a label's signature is wrong",
                        extra={
                            "seq": seq,
                            "src": label.src,
                            "uri": label.uri,
                            "val": label.val,
                            "caused_by": "signatures",
                        },
                    )

    def _wrong(self, batch: Sequence[tuple[int, Label]]) -> list[tuple[int, Label]]:
        check = self._keys.check
        return [(seq, label) for seq, label in batch if check(label) is Verdict.INVALID]
