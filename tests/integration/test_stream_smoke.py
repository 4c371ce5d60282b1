from __future__ import annotations

from support.database import TestDatabase
from support.reading import reading
from support.server import Server


async def test_everything_from_cursor_0_equals_the_table(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(3)
        database.fill(20)
        await reader.until_events(23)
    assert reader.events == database.stored()
