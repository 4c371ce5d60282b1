"""A notification and the loss of its connection may arrive together."""

from __future__ import annotations

import asyncio

import pytest

from sse_labels.database.pool import Database
from sse_labels.errors import DatabaseUnavailable

from support.database import TestDatabase


async def test_loss_that_comes_with_a_notification_is_translated(database: TestDatabase) -> None:
    source = Database(
        database.dsn, connect_timeout_seconds=5, query_timeout_seconds=5, max_connections=1
    )
    connection = await source.connect()
    await connection.fetch("listen")
    [(backend,)] = await connection.execute("SELECT pg_backend_pid()")
    # Nothing awaits in between: the loop finds both at once.
    database.execute("NOTIFY label_channel")
    database.execute("SELECT pg_terminate_backend(%s, 5000)", (backend,))
    with pytest.raises(DatabaseUnavailable):
        async with asyncio.timeout(10):
            while await connection.notified(5):
                pass
    source.close()
