"""Retention: old labels leave, in small steps, and readers are told.

Promises: the floor is raised and committed before anything below it is deleted;
it never passes the head; of several servers one deletes; no step holds a lock
that a writer or a reader waits for.
Stands beside the sequencer; without a horizon it only forgets old request keys.
Does not belong here: telling a reader that it is below the floor (`outbox`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sse_labels.database import Connection
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable
from sse_labels.metrics import Metrics
from sse_labels.store import State, Store

log = logging.getLogger(__name__)

#: How long a repeated request is recognised: a client's retries are over by then.
REQUEST_MEMORY_SECONDS = 86_400.0
#: Rest between two batches, so that deleting takes a part of the database's time and not all.
REST_SECONDS = 0.02


class Retention:
    """Deletes what lies below the horizons; `run` is its one task."""

    def __init__(
        self,
        store: Store,
        head: Callable[[], int],
        look: Callable[[], Awaitable[State]],
        metrics: Metrics,
        *,
        max_age_seconds: float | None,
        max_labels: int | None,
        sweep_seconds: float,
        batch_labels: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`look` reads the state, and keeps what is below its floor from being served."""
        self._store = store
        self._head = head
        self._look = look
        self._metrics = metrics
        self._max_age_seconds = max_age_seconds
        self._max_labels = max_labels
        self._sweep_seconds = sweep_seconds
        self._batch_labels = batch_labels
        self._clock = clock
        self._floor = 0
        self._swept = clock()
        metrics.gauges["sweep_age_seconds"] = self.sweep_age_seconds

    def sweep_age_seconds(self) -> float:
        """Return how long ago, at the most, everything below the horizon was gone."""
        if (self._max_age_seconds, self._max_labels) == (None, None):
            return 0.0
        return self._clock() - self._swept

    async def run(self) -> None:
        """Sweep until cancelled; while the database is away nothing is deleted."""
        while True:
            try:
                # Whoever raises the floor, and a new epoch too, is noticed here at the latest.
                self._floor = (await self._look()).floor
                if self._store.may_delete or self._store.may_publish:
                    await self.sweep()
            except DatabaseUnavailable as error:
                log.warning("retention waits for its next turn: error=%s", error)
            except DatabaseRefused as error:
                # Streams go on without it, and `sweep_age_seconds` tells.
                log.error("nothing was deleted: error=%s", error)
            await asyncio.sleep(self._sweep_seconds)

    async def sweep(self) -> bool:
        """Delete everything below today's horizon; False when another server is at it."""
        connection = await self._store.dedicated()
        try:
            if not await self._store.try_lock_retention(connection):
                return False
            if self._store.may_publish:
                await self._store.forget_requests(connection, REQUEST_MEMORY_SECONDS)
            horizons = (self._max_age_seconds, self._max_labels)
            if not self._store.may_delete or horizons == (None, None):
                return True
            await self._store.forget_times(connection)
            horizon = await self._horizon(connection)
            if horizon > self._floor:
                self._floor = await self._store.raise_floor(connection, horizon)
                await self._look()
            deleted = await self._delete(connection)
            self._swept = self._clock()
            if deleted:
                log.info("old labels deleted: labels=%s floor=%s", deleted, self._floor)
            return True
        finally:
            connection.close()

    async def _horizon(self, connection: Connection) -> int:
        """Return the oldest seq to keep: the newest of both rules, never above the head."""
        head = self._head()
        found = [0]
        if self._max_age_seconds is not None:
            await self._store.note_time(connection, head)
            found.append(await self._store.oldest_by_age(connection, self._max_age_seconds) or 0)
        if self._max_labels is not None:
            found.append(await self._store.oldest_by_count(connection, head, self._max_labels) or 0)
        return min(head, max(found))

    async def _delete(self, connection: Connection) -> int:
        total = 0
        while True:
            deleted = await self._store.delete_below_floor(connection, self._batch_labels)
            total += deleted
            self._metrics.count["labels_deleted"] += deleted
            if deleted < self._batch_labels:
                return total
            await asyncio.sleep(REST_SECONDS)
