"""Retention: deletes old labels, in small batches.

Promises: the floor is raised and committed before any label below it is deleted. The floor never
passes the head. If several servers run, one of them deletes. No step holds a lock that a writer or
a reader waits for. Without a horizon, only the keys of old requests are deleted.
The backfill tells a reader that its cursor is below the floor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sse_labels.database.connection import Connection
from sse_labels.database.pool import Database
from sse_labels.database.schema import Schema
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable
from sse_labels.feed.store import TableState
from sse_labels.metrics import Metrics

log = logging.getLogger(__name__)

#: A repeated request is recognised for this long: a client has stopped retrying by then.
REQUEST_MEMORY_SECONDS = 86_400.0
#: The pause between two batches, so that deleting does not take all of the database's time.
PAUSE_SECONDS = 0.02


class Retention:
    """Deletes labels below the horizon, the oldest seq to keep. `run` is its only task."""

    def __init__(
        self,
        database: Database,
        schema: Schema,
        head: Callable[[], int],
        read_state: Callable[[], Awaitable[TableState]],
        metrics: Metrics,
        *,
        max_age_seconds: float | None,
        max_labels: int | None,
        sweep_seconds: float,
        batch_labels: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read_state` also makes sure that events below the floor are no longer served."""
        self._database = database
        self._schema = schema
        self._head = head
        self._read_state = read_state
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
        """Return the seconds since everything below the horizon was deleted; 0 without a limit."""
        if (self._max_age_seconds, self._max_labels) == (None, None):
            return 0.0
        return self._clock() - self._swept

    async def run(self) -> None:
        """Sweep until cancelled. While the database is away, nothing is deleted."""
        while True:
            try:
                # Another server may have raised the floor or begun an epoch: notice it here.
                self._floor = (await self._read_state()).floor
                if self._schema.may_delete or self._schema.may_publish:
                    await self.sweep()
            except DatabaseUnavailable as error:
                log.warning("retention waits for its next turn", extra={"error": error})
            except DatabaseRefused as error:
                # Streams work without retention, and `sweep_age_seconds` shows the failure.
                log.error("nothing was deleted", extra={"error": error})
            await asyncio.sleep(self._sweep_seconds)

    async def sweep(self) -> bool:
        """Delete everything below the current horizon. Return False if another server deletes."""
        connection = await self._database.connect()
        try:
            # The session holds the lock until the connection is closed.
            [(locked,)] = await connection.fetch("lock_retention")
            if not locked:
                return False
            if self._schema.may_publish:
                await connection.fetch("forget_requests", seconds=REQUEST_MEMORY_SECONDS)
            horizons = (self._max_age_seconds, self._max_labels)
            if not self._schema.may_delete or horizons == (None, None):
                return True
            await connection.fetch("forget_times")
            horizon = await self._horizon(connection)
            if horizon > self._floor:
                # The new floor is committed when `fetch` returns.
                [(self._floor, _)] = await connection.fetch("raise_floor", floor=horizon)
                await self._read_state()
            deleted = await self._delete(connection)
            self._swept = self._clock()
            if deleted:
                log.info("old labels deleted", extra={"labels": deleted, "floor": self._floor})
            return True
        finally:
            connection.close()

    async def _horizon(self, connection: Connection) -> int:
        """Return the oldest seq to keep: the larger result of both rules, never above the head."""
        head = self._head()
        kept: list[int] = [0]
        if self._max_age_seconds is not None:
            await connection.fetch("note_time", head=head)
            [(seq,)] = await connection.fetch("oldest_by_age", seconds=self._max_age_seconds)
            kept.append(seq or 0)
        if self._max_labels is not None:
            # The block returns no row while the table has fewer labels.
            found = await connection.fetch("oldest_by_count", head=head, labels=self._max_labels)
            kept += [seq for (seq,) in found]
        return min(head, max(kept))

    async def _delete(self, connection: Connection) -> int:
        total = 0
        while True:
            [(deleted,)] = await connection.fetch("delete_below_floor", limit=self._batch_labels)
            total += int(deleted)
            self._metrics.count["labels_deleted"] += deleted
            if deleted < self._batch_labels:
                return total
            await asyncio.sleep(PAUSE_SECONDS)
