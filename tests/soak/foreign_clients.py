"""Clients that nobody here wrote, in five languages, through restarts and a full server.

    make soak PYTEST_ARGS='-k foreign'

Go's, Rust's and Java's are built where their toolchains are; what is missing is named. It ends with
a table, and fails when a client lost, doubled or never received a label.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from oracle import tell

from support.database import TestDatabase
from support.foreign import WAYS, Struck, struck, table
from support.foreign_libraries import built_libraries, quick_readers, subscribers

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sse-labels" / "clients"
FAULTS = ("SIGTERM", "SIGKILL", "full of streams", "full of connections")
#: How long a server is away or full: clients come back several times meanwhile.
AWAY_SECONDS = 8.0
#: How long a client may take to come back; the longest back-off is that of a full server.
PATIENCE_SECONDS = 45.0
#: A full server says ten times as much.
SETTINGS = ("--retry-min-seconds=0.5", "--retry-max-seconds=1")


async def away(_: Struck) -> None:
    await asyncio.sleep(AWAY_SECONDS)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
async def test_foreign_clients_lose_and_double_nothing(
    database: TestDatabase, way: str, fault: str, request: pytest.FixtureRequest
) -> None:
    built, missing = await asyncio.to_thread(built_libraries, CACHE)
    for line in missing:
        tell(request.config, line)
    done = await struck(
        [*quick_readers(), *subscribers(), *built],
        database,
        way,
        [fault] * 2,
        settings=SETTINGS,
        site={},
        away=away,
        patience_seconds=PATIENCE_SECONDS,
    )
    tell(request.config, table(done))
    assert [row for row in done if not row.whole] == []
