"""`sse-labels mirror` of the real Ozone and the real skyware labeler, with kills on all sides."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from oracle import tell

from sse_labels.signatures import SigningKey

from support.database import TestDatabase, until
from support.node import NodeProgram
from support.ozone import (
    OZONE_DID,
    SIGNING_KEY,
    Ozone,
    account,
    ozone_program,
)
from support.program import Program, free_port, ran, running
from support.reading import reading

SKYWARE_DID = "did:plc:" + "k" * 24
SKYWARE_KEY = "2e" * 32
QUICK = ("--report-seconds=0.2", "--log-level=info")


def mirror_of(database: TestDatabase, *urls: str, **more: Any) -> Any:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    return running("mirror", *urls, "--dsn", database.dsn, *QUICK, *options)


def values(database: TestDatabase, src: str) -> list[tuple[str, str, bool | None]]:
    """What was mirrored of a source, in order: it names each label by its URI."""
    return database.execute(
        "SELECT uri, val, neg IS TRUE FROM label WHERE src = %s ORDER BY id", (src,)
    )


class Skyware:
    """The real `@skyware/labeler`, on an SQLite file that survives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.program = NodeProgram(
            "skyware.mjs",
            {
                "LABELER_DID": SKYWARE_DID,
                "SIGNING_KEY": SKYWARE_KEY,
                "LABELS_DB": f"file:{folder / 'labels.db'}",
                "PORT": str(self.port),
            },
        )
        self.url = f"ws://127.0.0.1:{self.port}"
        #: What it was told to publish and said that it did.
        self.published: list[tuple[str, str, bool]] = []

    async def start(self) -> None:
        self.program.start()
        await asyncio.to_thread(self.program.next)

    async def publish(self, number: int) -> None:
        label = {"uri": f"did:plc:{number:x>24}", "val": "spam", "neg": number % 5 == 4}
        await asyncio.to_thread(self.program.tell, [label])
        self.published.append((label["uri"], "spam", label["neg"]))

    async def kill(self) -> None:
        await asyncio.to_thread(self.program.stop, signal.SIGKILL)

    def forget(self) -> None:
        """Lose the database."""
        for file in self._folder.glob("labels.db*"):
            file.unlink()


class RealOzone:
    """The real Ozone, on a port and a database that survive it."""

    def __init__(self, database: TestDatabase) -> None:
        self.port = free_port()
        self._programs = ozone_program(database, OZONE_PORT=str(self.port))
        self.program = self._programs.__enter__()
        self.url = f"ws://127.0.0.1:{self.port}"
        self.published: list[tuple[str, str, bool]] = []
        self._ozone: Ozone | None = None

    async def start(self) -> None:
        if self._ozone is not None:
            self.program.start()
            await self._ozone.close()
        await asyncio.to_thread(self.program.next)
        self._ozone = Ozone(self.program, self.port)

    async def publish(self, number: int) -> None:
        assert self._ozone is not None
        subject = account(f"{number}n")
        await self._ozone.label(subject, "spam")
        self.published.append((subject["did"], "spam", False))

    async def kill(self) -> None:
        await asyncio.to_thread(self.program.stop, signal.SIGKILL)

    async def close(self) -> None:
        if self._ozone is not None:
            await self._ozone.close()
        self._programs.__exit__(None, None, None)


@pytest.fixture
def skyware(tmp_path: Path) -> Iterator[Skyware]:
    made = Skyware(tmp_path)
    yield made
    made.program.stop()


class Keeper:
    """The mirror's process, which is killed and started again."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self.program: Program | None = None
        self.kills = 0

    def start(self) -> None:
        self.program = Program(*self._arguments)

    async def kill(self) -> None:
        assert self.program is not None
        await asyncio.to_thread(self.program.end, signal.SIGKILL)
        self.kills += 1

    def stop(self) -> None:
        if self.program is not None and self.program.process.poll() is None:
            self.program.end(signal.SIGKILL)


@contextmanager
def kept(database: TestDatabase, *urls: str) -> Iterator[Keeper]:
    keeper = Keeper("mirror", *urls, "--dsn", database.dsn, *QUICK)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()


async def test_ozone_and_skyware_are_mirrored_through_kills_on_both_sides(
    database: TestDatabase,
    empty_database: TestDatabase,
    skyware: Skyware,
    request: pytest.FixtureRequest,
) -> None:
    chance = random.Random(7)
    ozone = RealOzone(empty_database)
    numbers = itertools.count(1)
    kills = 0
    try:
        await asyncio.gather(ozone.start(), skyware.start())
        with kept(database, ozone.url, skyware.url) as mirror:
            for _ in range(6):
                for _ in range(chance.randrange(4, 12)):
                    for each in (ozone, skyware):
                        await each.publish(next(numbers))
                # In the midst: nobody waits until what was published has been stored.
                struck = chance.choice([[mirror], [ozone], [skyware], [mirror, ozone, skyware]])
                for each in struck:
                    await each.kill()
                kills += len(struck)
                for each in struck:
                    if isinstance(each, Keeper):
                        each.start()
                    else:
                        await each.start()
            for each in (ozone, skyware):
                await each.publish(next(numbers))
            for did, each in ((OZONE_DID, ozone), (SKYWARE_DID, skyware)):
                last = each.published[-1]
                await until(
                    lambda did=did, last=last: values(database, did)[-1:] == [last], seconds=60
                )
    finally:
        await ozone.close()
    told = []
    for did, each in ((OZONE_DID, ozone), (SKYWARE_DID, skyware)):
        received = values(database, did)
        assert received == each.published
        lost = len(set(each.published) - set(received))
        doubled = len(received) - len(set(received))
        told.append(
            f"{type(each).__name__}: published {len(each.published)}, received {len(received)},"
            f" lost {lost}, doubled {doubled}"
        )
    tell(request.config, f"mirror through {kills} kills: {'; '.join(told)}")


async def test_what_is_mirrored_is_streamed_and_its_signatures_are_kept(
    database: TestDatabase, skyware: Skyware, tmp_path: Path
) -> None:
    key = SigningKey(bytes.fromhex(SKYWARE_KEY))
    keys = tmp_path / "keys"
    keys.write_text(f"{SKYWARE_DID} {key.did_key}\n")
    await skyware.start()
    for number in range(1, 6):
        await skyware.publish(number)
    with (
        mirror_of(database, f"{SKYWARE_DID}={skyware.url}", source_keys_file=keys) as mirror,
        running(
            "serve", "--port=0", "--dsn", database.dsn, "--source-keys-file", str(keys)
        ) as server,
    ):
        async with reading(f"{server.url()}/stream", cursor=0) as stream:
            await stream.until_seq(5)
            await skyware.publish(6)
            assert await stream.until_seq(6) == database.stored()
        # skyware signs a negation that is false, and states it: so does whoever passes it on.
        negations = [event["labels"][0]["neg"] for event in stream.events]
        assert negations == [False, False, False, True, False, False]
        mirror.wait_for(r"mirrored: upstream=\S+ cursor=6 stored=6 known=0 set_aside=0")
        assert mirror.end() == 0
    assert mirror.err[-1].endswith("reconnects=0")
    assert values(database, SKYWARE_DID) == skyware.published


async def test_a_skyware_labeler_that_lost_its_database_is_read_from_its_beginning(
    database: TestDatabase, skyware: Skyware
) -> None:
    await skyware.start()
    for number in range(1, 6):
        await skyware.publish(number)
    with mirror_of(database, skyware.url) as mirror:
        mirror.wait_for("cursor=5 stored=5")
        await skyware.kill()
        skyware.forget()
        await skyware.start()
        for number in range(6, 9):
            await skyware.publish(number)
        mirror.wait_for("began anew, and is read from its beginning: .*cursor=5")
        mirror.wait_for("cursor=3 stored=8")
    assert values(database, SKYWARE_DID) == skyware.published


async def test_a_wrong_key_sets_labels_aside_and_says_so(
    database: TestDatabase, skyware: Skyware, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{SKYWARE_DID} {SigningKey(bytes.fromhex(SIGNING_KEY)).did_key}\n")
    await skyware.start()
    await skyware.publish(1)
    with mirror_of(database, skyware.url, source_keys_file=keys) as mirror:
        mirror.wait_for(r"a label is set aside: upstream=\S+ seq=1 .*is not a signature of")
        mirror.wait_for(r"mirrored: .*stored=0 known=0 set_aside=1")
    assert values(database, SKYWARE_DID) == []
    assert database.execute("SELECT count(*) FROM label_set_aside") == [(1,)]


def test_ozones_database_is_not_mirrored_into(empty_database: TestDatabase) -> None:
    for table in ("label", "moderation_event", "signing_key"):
        empty_database.execute(f"CREATE TABLE {table} (id bigserial PRIMARY KEY)")
    program = ran("mirror", "wss://labeler.example", "--dsn", empty_database.dsn)
    assert program.process.returncode == 2
    assert "Ozone's is never written" in program.err[-1]
