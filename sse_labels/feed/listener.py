"""The listener: turns notifications of the database into wakes.

Promises: after every (re)connect it listens first and wakes then, so that no
commit falls between the two; a connection that died silently is found by a
query with a time-out, and replaced.
Stands beside the sequencer. NOTIFY is a hint, the table is the truth: without
this file everything still arrives, up to `poll_seconds` later.
Does not belong here: reading labels.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sse_labels.backoff import Backoff
from sse_labels.database.pool import Database
from sse_labels.errors import DatabaseUnavailable
from sse_labels.metrics import Metrics

log = logging.getLogger(__name__)

#: After so much silence the connection has to answer a query …
SILENCE_SECONDS = 10.0
#: … within this time.
ANSWER_SECONDS = 5.0
#: What a notification carries when the floor was raised; that of new labels carries nothing.
FLOOR = "floor"


class Listener:
    """Calls `wake` whenever labels may have been committed; `run` is its one task.

    And `floor_raised` whenever the floor may have been raised.
    """

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        wake: Callable[[], None],
        floor_raised: Callable[[], None],
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._wake = wake
        self._floor_raised = floor_raised
        #: Set while notifications are being received.
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listen until cancelled."""
        backoff = Backoff()
        lost = False
        while True:
            try:
                connection = await self._database.connect()
                try:
                    if lost:
                        self._metrics.count["database_reconnects"] += 1
                    await connection.fetch("listen")
                    self.listening.set()
                    self._floor_raised()
                    self._wake()
                    backoff.reset()
                    while True:
                        if heard := await connection.notified(SILENCE_SECONDS):
                            if FLOOR in heard:
                                self._floor_raised()
                            self._wake()
                        else:
                            await connection.fetch("ping", timeout_seconds=ANSWER_SECONDS)
                finally:
                    self.listening.clear()
                    connection.close()
            except DatabaseUnavailable as error:
                lost = True
                wait = backoff.next()
                log.warning("not listening", extra={"error": error, "next_try_seconds": wait})
                await asyncio.sleep(wait)
