"""A task that is told to stop stops, even when its answer arrives at that very moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sse_labels.database.pool import Database

from support.database import TestDatabase


async def test_cancellation_that_arrives_with_the_answer_is_not_swallowed(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Database(
        database.dsn, connect_timeout_seconds=5, query_timeout_seconds=5, max_connections=1
    )
    connection = await source.connect()
    task = asyncio.create_task(connection.fetch("ping"))
    make_waiter = connection._raw._create_waiter

    def waiter_that_cancels(name: str) -> Any:
        waiter = make_waiter(name)
        # After the driver's own callbacks, and before the task gets its answer.
        asyncio.get_running_loop().call_soon(
            lambda: waiter.add_done_callback(lambda _: task.cancel())
        )
        return waiter

    monkeypatch.setattr(connection._raw, "_create_waiter", waiter_that_cancels)
    with pytest.raises(asyncio.CancelledError):
        await task
    connection.close()
    source.close()
