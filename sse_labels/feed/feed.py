"""The feed: creates and connects the parts of the corridor that a process has once."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from sse_labels.config import Settings
from sse_labels.database.pool import Database
from sse_labels.database.schema import Schema
from sse_labels.feed.listener import Listener
from sse_labels.feed.pages import Pages
from sse_labels.feed.retention import Retention
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.store import Store
from sse_labels.metrics import Metrics


class Feed:
    """Follows the table once for all consumers. Nothing runs before `tasks` are started."""

    def __init__(
        self, database: Database, schema: Schema, metrics: Metrics, settings: Settings
    ) -> None:
        self.store = Store(database, schema, withhold_unsigned=settings.unsigned == "withhold")
        self.sequencer = Sequencer(
            self.store,
            metrics,
            page_max_events=settings.page_max_events,
            ring_max_bytes=settings.ring_max_bytes,
            poll_seconds=settings.poll_seconds,
            gather_seconds=settings.gather_seconds,
        )
        self.listener = Listener(
            database, metrics, self.sequencer.wake, self.sequencer.floor_raised
        )
        self.pages = Pages(
            self.store,
            self.head,
            metrics,
            page_max_events=settings.page_max_events,
            max_reads=settings.backfill_max_reads,
            cache_max_bytes=settings.page_cache_max_bytes,
        )
        self.retention = Retention(
            database,
            schema,
            self.head,
            self.sequencer.read_state,
            metrics,
            max_age_seconds=settings.retention_max_age_seconds,
            max_labels=settings.retention_max_labels,
            sweep_seconds=settings.retention_sweep_seconds,
            batch_labels=settings.retention_batch_labels,
        )

    def head(self) -> int:
        """Return the newest settled seq."""
        return self.sequencer.head

    def floor(self) -> int:
        """Return the oldest seq that is still served."""
        return self.sequencer.floor

    def tasks(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return the tasks that run as long as the server, by name."""
        return {
            "sequencer": self.sequencer.run(),
            "listener": self.listener.run(),
            "retention": self.retention.run(),
        }
