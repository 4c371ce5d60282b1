"""`sse-labels mirror` of the real Ozone and the real skyware labeler, with kills on all sides."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from oracle import tell

from sse_labels.protocol.signatures import SigningKey

from support.database import TestDatabase, until
from support.labelers import (
    SKYWARE_DID,
    SKYWARE_KEY,
    RealOzone,
    Skyware,
    mirror_program,
    mirrored,
    named,
    verdict,
)
from support.node import PACKAGES
from support.ozone import SIGNING_KEY
from support.program import ran, running
from support.reading import reading


def mirror_of(database: TestDatabase, *arguments: str) -> Any:
    quick = ("--report-seconds=0.2", "--retry-longest-seconds=0.5")
    return running("mirror", *arguments, "--dsn", database.dsn, *quick)


@pytest.fixture
async def skyware(tmp_path: Path) -> AsyncIterator[Skyware]:
    made = Skyware(tmp_path)
    await made.start()
    yield made
    await made.close()


@pytest.fixture(params=PACKAGES)
async def real_ozone(
    empty_database: TestDatabase, request: pytest.FixtureRequest
) -> AsyncIterator[RealOzone]:
    made = RealOzone(empty_database, request.param)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


async def test_ozone_and_skyware_are_mirrored_through_kills_on_both_sides(
    database: TestDatabase,
    real_ozone: RealOzone,
    skyware: Skyware,
    request: pytest.FixtureRequest,
) -> None:
    chance = random.Random(7)
    labelers = (real_ozone, skyware)
    numbers = itertools.count(1)
    kills = 0
    with mirror_program(database, *map(named, labelers)) as mirror:
        await mirror.start()
        for struck in ([mirror], [real_ozone], [skyware], [mirror, *labelers]):
            for _ in range(chance.randrange(4, 12)):
                for each in labelers:
                    await each.publish(next(numbers))
            # In the midst: nobody waits until what was published has been stored.
            for victim in struck:
                await victim.kill()
            for victim in struck:
                await victim.start()
            kills += len(struck)
        for each in labelers:
            await each.publish(next(numbers))
        for each in labelers:
            last = each.published[-1:]
            await until(
                lambda each=each, last=last: mirrored(database, each.did)[-1:] == last, seconds=60
            )
    told = [verdict(each, mirrored(database, each.did)) for each in labelers]
    tell(request.config, f"mirror through {kills} kills: {'; '.join(told)}")


async def test_what_is_mirrored_is_streamed_and_its_signatures_are_kept(
    database: TestDatabase, skyware: Skyware, tmp_path: Path
) -> None:
    key = SigningKey(bytes.fromhex(SKYWARE_KEY))
    keys = tmp_path / "keys"
    keys.write_text(f"{SKYWARE_DID} {key.did_key}\n")
    for number in range(1, 6):
        await skyware.publish(number)
    with (
        mirror_of(database, f"{SKYWARE_DID}={skyware.url}", f"--source-keys-file={keys}") as mirror,
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
    assert mirror.err[-1].endswith("reconnects=0 lines_left_out=0 left_out=0")
    assert mirrored(database, SKYWARE_DID) == skyware.published


async def test_a_skyware_labeler_that_lost_its_database_is_read_from_its_beginning(
    database: TestDatabase, skyware: Skyware
) -> None:
    for number in range(1, 6):
        await skyware.publish(number)
    with mirror_of(database, f"{SKYWARE_DID}={skyware.url}") as mirror:
        mirror.wait_for("cursor=5 stored=5")
        await skyware.kill()
        skyware.forget()
        await skyware.start()
        for number in range(6, 9):
            await skyware.publish(number)
        mirror.wait_for("began anew, and is read from its beginning: .*cursor=5")
        mirror.wait_for("cursor=3 stored=8")
    assert mirrored(database, SKYWARE_DID) == skyware.published


async def test_a_wrong_key_sets_labels_aside_and_says_so(
    database: TestDatabase, skyware: Skyware, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{SKYWARE_DID} {SigningKey(bytes.fromhex(SIGNING_KEY)).did_key}\n")
    await skyware.publish(1)
    with mirror_of(database, skyware.url, f"--source-keys-file={keys}") as mirror:
        mirror.wait_for(r"a label is set aside: upstream=\S+ seq=1 .*is not a signature of")
        mirror.wait_for(r"mirrored: .*stored=0 known=0 set_aside=1")
    assert mirrored(database, SKYWARE_DID) == []
    assert database.execute("SELECT count(*) FROM label_set_aside") == [(1,)]


def test_ozones_database_is_not_mirrored_into(empty_database: TestDatabase) -> None:
    for table in ("label", "moderation_event", "signing_key"):
        empty_database.execute(f"CREATE TABLE {table} (id bigserial PRIMARY KEY)")
    program = ran("mirror", "did:web:a.example=wss://a.example", "--dsn", empty_database.dsn)
    assert program.process.returncode == 2
    assert "Ozone's is never written" in program.err[-1]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("wss://a.example", "DID=wss://…; or --source-keys-file"),
        ("{src}=wss://a.example", "DELETE FROM label_own_source WHERE src = '{src}'"),
    ],
    ids=["no source is named", "its source is published here"],
)
def test_an_upstream_that_may_not_speak_is_refused_at_start(
    database: TestDatabase, wanted: str, said: str
) -> None:
    database.insert(1)
    src = database.stored()[0]["labels"][0]["src"]
    program = ran("mirror", wanted.format(src=src), "--dsn", database.dsn)
    assert program.process.returncode == 2
    assert said.format(src=src) in program.err[-1]


async def test_with_any_source_an_upstream_speaks_for_all(
    database: TestDatabase, skyware: Skyware
) -> None:
    await skyware.publish(1)
    with mirror_of(database, skyware.url, "--any-source") as mirror:
        mirror.wait_for("cursor=1 stored=1")
    assert mirrored(database, SKYWARE_DID) == skyware.published
