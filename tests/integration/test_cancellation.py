"""A task that is told to stop stops, even when its answer arrives at that very moment."""

from __future__ import annotations

import asyncio

import pytest
from support.database import TestDatabase

from sse_labels.database import Database


async def test_cancellation_that_arrives_with_the_answer_is_not_swallowed(
    database: TestDatabase,
) -> None:
    source = Database(
        database.dsn, connect_timeout_seconds=5, query_timeout_seconds=5, max_connections=1
    )
    connection = await source.connect()
    task = asyncio.create_task(connection.fetch("ping"))
    while connection._raw._waiter is None:
        await asyncio.sleep(0)
    # Runs after the driver's own callbacks, and before the task gets its answer.
    connection._raw._waiter.add_done_callback(lambda _: task.cancel())
    with pytest.raises(asyncio.CancelledError):
        await task
    connection.close()
    source.close()
