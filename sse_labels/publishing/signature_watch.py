"""The watch: checks the signatures of new labels behind the stream, and flags wrong ones.

Promises: no label waits for it and none is held back; each wrong signature is a line in the log
and counted, and labels that came faster than they could be checked are counted, too.
Stands beside the corridor, behind the sequencer, which hands it what it has published.
Does not belong here: refusing labels (the publisher does); what a signature is (`signatures`).
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

#: Labels that may wait to be checked, at 40 µs each: 4 s of work.
WAITING_MAX_LABELS = 100_000
#: Checked in one go in a thread, so that the event loop goes on.
CHECKED_AT_ONCE = 500


class SignatureWatch:
    """Checks what it is handed; `run` is its one task."""

    def __init__(self, keys: SourceKeys, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics
        self._waiting: deque[tuple[int, Label]] = deque()
        self._wake = asyncio.Event()

    def take(self, rows: Sequence[Row]) -> None:
        """Check these rows soon."""
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
                # The lock of the interpreter is released while a signature is checked.
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
        return [one for one in batch if check(one[1]) is Verdict.INVALID]
