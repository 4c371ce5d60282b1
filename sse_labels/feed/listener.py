"""The listener: wakes the sequencer when the database sends a notification.

Promises: after every (re)connect, LISTEN comes first and the wake second, so that no commit is
missed between the two. A query with a time-out finds a connection that died silently, and the
connection is replaced. NOTIFY is a hint and the table is the truth: without notifications every
label still arrives, up to `poll_seconds` later.
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

#: After this time without a notification the connection has to answer a query.
SILENCE_SECONDS = 10.0
#: The connection has this long to answer the query.
ANSWER_SECONDS = 5.0
#: The payload of a notification about a raised floor. One about new labels has no payload.
FLOOR = "floor"


class Listener:
    """Calls `wake` when new labels may exist, and `floor_raised` when the floor may be higher.

    `run` is its only task.
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
                        if payloads := await connection.notified(SILENCE_SECONDS):
                            if FLOOR in payloads:
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
