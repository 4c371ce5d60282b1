"""Readers of event streams that nobody here wrote, through restarts and a full server.

Those of other languages are in `make soak`.
"""

from __future__ import annotations

import pytest
from oracle import tell

from support.database import TestDatabase, until
from support.foreign import FULL, WAYS, Struck, struck, table
from support.foreign_libraries import quick_readers
from support.program import PATIENCE_SECONDS

FAULTS = ("SIGTERM", "SIGKILL", "full of streams")
#: Stored while the server is away.
LABELS_MEANWHILE = 10
SETTINGS = ("--retry-min-seconds=0.01", "--retry-max-seconds=0.02")
#: The same for what nginx itself says.
SITE = {
    "25% 2000": "25% 20",
    "25% 3000": "25% 30",
    "25% 4000": "25% 40",
    "* 5000": "* 50",
}


async def away(server: Struck) -> None:
    """Wait until labels were stored meanwhile, and each client has been told to come back."""
    told = "TooManyConnections" if server.fault in FULL else "NotReady"
    before = [reader.told[told] for reader in server.readers]
    [last] = server.database.insert()

    def stored() -> bool:
        [(newest,)] = server.database.execute("SELECT max(id) FROM label")
        return bool(newest >= last + LABELS_MEANWHILE)

    def all_were_told() -> bool:
        return all(
            reader.told[told] > count or not reader.runs
            for reader, count in zip(server.readers, before, strict=True)
        )

    await until(stored)
    # Without nginx nobody tells them that no server is there.
    if server.fault in FULL or server.proxy:
        await until(all_were_told)


@pytest.mark.parametrize("way", WAYS)
async def test_foreign_readers_lose_and_double_nothing(
    database: TestDatabase, way: str, request: pytest.FixtureRequest
) -> None:
    rows = await struck(
        quick_readers(),
        database,
        way,
        FAULTS,
        settings=SETTINGS,
        site=SITE,
        away=away,
        patience_seconds=PATIENCE_SECONDS,
    )
    tell(request.config, table(rows))
    assert [row for row in rows if not row.whole] == []
