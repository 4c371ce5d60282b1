"""Real labelers by other authors, and a mirror of them; all can be killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiohttp
from _pytest.outcomes import Failed

from support.database import TestDatabase
from support.node import NEWEST, NodeProgram
from support.ozone import OZONE_DID, Ozone, account, ozone_program
from support.program import Program, free_port

SKYWARE_DID = "did:plc:" + "k" * 24
SKYWARE_KEY = "2e" * 32


class Said(NamedTuple):
    """The fields that identify a label in these tests; each URI is used once."""

    uri: str
    val: str
    neg: bool


class RealLabeler(Protocol):
    """The program of one labeler; its port and its database stay when it is killed."""

    did: str
    url: str
    #: The labels that it confirmed, in order.
    published: list[Said]

    async def start(self) -> None:
        """Start it; also after it was killed."""

    async def publish(self, number: int) -> None:
        """Publish one label; raise when there is no answer."""

    async def kill(self) -> None:
        """Kill it."""

    def truth(self) -> list[Said]:
        """The labels of its database, in its order."""


class Skyware:
    """The real `@skyware/labeler`, on an SQLite file."""

    did = SKYWARE_DID

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.url = f"ws://127.0.0.1:{self.port}"
        self.published: list[Said] = []
        self._program = NodeProgram(
            "skyware.mjs",
            {
                "LABELER_DID": self.did,
                "SIGNING_KEY": SKYWARE_KEY,
                "LABELS_DB": f"file:{folder / 'labels.db'}",
                "PORT": str(self.port),
            },
        )

    async def start(self) -> None:
        self._program.start()
        await asyncio.to_thread(self._program.next)

    async def publish(self, number: int) -> None:
        said = Said(f"did:plc:{number:x>24}", "spam", number % 5 == 4)
        try:
            await asyncio.to_thread(self._program.tell, [said._asdict()])
        except (Failed, OSError, ValueError, AssertionError) as error:
            raise Unanswered from error
        self.published.append(said)

    async def kill(self) -> None:
        await asyncio.to_thread(self._program.stop, signal.SIGKILL)

    def truth(self) -> list[Said]:
        with contextlib.closing(sqlite3.connect(self._folder / "labels.db")) as database:
            rows = database.execute("SELECT uri, val, neg FROM labels ORDER BY id").fetchall()
        return [Said(uri, val, bool(neg)) for uri, val, neg in rows]

    def forget(self) -> None:
        """Delete the database."""
        for file in self._folder.glob("labels.db*"):
            file.unlink()

    async def close(self) -> None:
        self._program.stop()


class RealOzone:
    """The real Ozone, on a PostgreSQL database."""

    did = OZONE_DID

    def __init__(self, database: TestDatabase, packages: str = NEWEST) -> None:
        self._database = database
        self.port = free_port()
        self.url = f"ws://127.0.0.1:{self.port}"
        self.published: list[Said] = []
        self._programs = ozone_program(database, packages, OZONE_PORT=str(self.port))
        self._program = self._programs.__enter__()
        self._ozone: Ozone | None = None

    async def start(self) -> None:
        if self._ozone is not None:
            self._program.start()
            await self._ozone.close()
        await asyncio.to_thread(self._program.next)
        self._ozone = Ozone(self._program, self.port)

    async def publish(self, number: int) -> None:
        assert self._ozone is not None
        said = Said(account(f"{number}n")["did"], "spam", False)
        try:
            await self._ozone.label(account(f"{number}n"), said.val)
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise Unanswered from error
        self.published.append(said)

    async def kill(self) -> None:
        await asyncio.to_thread(self._program.stop, signal.SIGKILL)

    def truth(self) -> list[Said]:
        rows = self._database.execute("SELECT uri, val, neg FROM label ORDER BY id")
        return [Said(*row) for row in rows]

    async def close(self) -> None:
        if self._ozone is not None:
            await self._ozone.close()
        self._programs.__exit__(None, None, None)


class Unanswered(Exception):
    """The labeler died before it answered whether it published."""


def named(labeler: RealLabeler) -> str:
    """The argument of `mirror` for this labeler."""
    return f"{labeler.did}={labeler.url}"


def mirrored(database: TestDatabase, did: str) -> list[Said]:
    """The mirrored labels of a source, in order."""
    rows = database.execute(
        "SELECT uri, val, neg IS TRUE FROM label WHERE src = %s ORDER BY id", (did,)
    )
    return [Said(*row) for row in rows]


class MirrorProgram:
    """The program `sse-labels mirror`; it can be killed and started again."""

    def __init__(self, database: TestDatabase, *arguments: str) -> None:
        self._arguments = ("mirror", *arguments, "--dsn", database.dsn, "--report-seconds=0.2")
        self.program: Program | None = None

    async def start(self) -> None:
        self.program = Program(*self._arguments)

    async def kill(self) -> None:
        await asyncio.to_thread(self.end, signal.SIGKILL)

    def end(self, how: signal.Signals) -> None:
        if self.program is not None and self.program.process.poll() is None:
            self.program.end(how)


@contextmanager
def mirror_program(database: TestDatabase, *arguments: Any) -> Iterator[MirrorProgram]:
    """A mirror that is not started yet; it is killed after the block."""
    mirror = MirrorProgram(database, *map(str, arguments))
    try:
        yield mirror
    finally:
        mirror.end(signal.SIGKILL)


def verdict(labeler: RealLabeler, received: list[Said]) -> str:
    """Compare the mirrored labels with the labeler's database; return the figures."""
    truth = labeler.truth()
    there = set(received)
    lost = [said for said in truth if said not in there]
    doubled = len(received) - len(there)
    assert received == truth, (lost, doubled)
    assert set(labeler.published) <= set(truth)
    return (
        f"{type(labeler).__name__}: published {len(truth)}, received {len(received)},"
        f" lost {len(lost)}, doubled {doubled}"
    )
