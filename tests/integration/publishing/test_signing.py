"""Published labels are signed, wrong signatures refused, and those of others flagged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sse_labels.errors import ConfigError
from sse_labels.protocol.label import Label, label_json
from sse_labels.protocol.signatures import SigningKey, Verdict
from sse_labels.publishing.keys import source_keys_in

from support.database import TestDatabase, until
from support.server import PUBLISH_TOKEN, RunServer, Server

SRC = "did:plc:" + "s" * 24
OTHER = "did:plc:" + "t" * 24
KEY = SigningKey(b"\x1f" * 32)


@pytest.fixture
def signing(tmp_path: Path) -> dict[str, Any]:
    """Settings: a key, and the same key as that of SRC."""
    (tmp_path / "key").write_text("1f" * 32)
    (tmp_path / "keys").write_text(f"{SRC} {KEY.did_key}\n")
    return {"signing_key_file": tmp_path / "key", "source_keys_file": tmp_path / "keys"}


def unsigned(src: str, number: int = 0, **more: Any) -> Label:
    uri = f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{number}"
    label = Label(src, uri, "", "spam", None, "2026-01-01T00:00:00Z", None, None)
    return label._replace(**more)


async def post(server: Server, *labels: Label, key: str | None = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {PUBLISH_TOKEN}"}
    if key:
        headers["Idempotency-Key"] = key
    async with aiohttp.ClientSession(headers=headers) as session:
        body = {"labels": [label_json(*label) for label in labels]}
        async with session.post(f"{server.url}/labels", json=body) as answer:
            return answer.status, await answer.json()


def stored(database: TestDatabase) -> list[Label]:
    rows = database.execute("SELECT src, uri, cid, val, neg, cts, exp, sig FROM label ORDER BY id")
    return [Label(*row[:7], None if row[7] is None else bytes(row[7])) for row in rows]


async def test_labels_that_come_unsigned_are_signed(
    run_server: RunServer, database: TestDatabase, signing: dict[str, Any]
) -> None:
    given = [unsigned(SRC), unsigned(SRC, 1, neg=True, exp="2030-01-01T00:00:00Z")]
    async with run_server(**signing) as server:
        assert (await post(server, *given))[0] == 201
    keys = source_keys_in(signing["source_keys_file"])
    assert [label._replace(sig=None) for label in stored(database)] == given
    assert [keys.check(label) for label in stored(database)] == [Verdict.VALID] * 2


async def test_the_key_signs_for_its_source_alone_when_one_is_named(
    run_server: RunServer, database: TestDatabase, signing: dict[str, Any]
) -> None:
    async with run_server(**signing, signing_did=SRC) as server:
        assert (await post(server, unsigned(SRC), unsigned(OTHER)))[0] == 201
    assert [label.sig is None for label in stored(database)] == [False, True]


async def test_a_wrong_signature_is_refused_and_nothing_is_stored(
    run_server: RunServer, database: TestDatabase, signing: dict[str, Any]
) -> None:
    good = unsigned(SRC)
    good = KEY.sign(good)
    async with run_server(**signing) as server:
        status, said = await post(server, good, good._replace(val="rude"))
        assert status == 422
        assert said["error"] == "InvalidLabel"
        assert said["message"].startswith("labels[1].sig: is not a signature of did:plc:sss")
        assert stored(database) == []
        assert server.app.metrics.count["labels_refused"] == 2
        assert (await post(server, good))[0] == 201
    assert stored(database) == [good]


async def test_a_signature_of_a_source_without_a_known_key_is_kept_as_it_came(
    run_server: RunServer, database: TestDatabase, signing: dict[str, Any]
) -> None:
    given = unsigned(OTHER)._replace(sig=b"\7" * 64)
    async with run_server(**signing) as server:
        assert (await post(server, given))[0] == 201
    assert stored(database) == [given]


async def test_a_request_that_is_repeated_with_its_key_is_stored_once_though_signed(
    run_server: RunServer, database: TestDatabase, signing: dict[str, Any]
) -> None:
    async with run_server(**signing) as server:
        first = await post(server, unsigned(SRC), key="again")
        assert await post(server, unsigned(SRC), key="again") == first
    assert len(stored(database)) == 1


async def test_wrong_signatures_that_others_stored_are_flagged_and_streamed_all_the_same(
    run_server: RunServer,
    database: TestDatabase,
    signing: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with run_server(**signing) as server:
        good = unsigned(SRC)
        for label in (KEY.sign(good), good._replace(sig=b"\1" * 64), good):
            database.insert(1, **label._asdict())
        await until(lambda: server.app.metrics.count["signatures_invalid"] == 1)
        await until(lambda: server.app.feed.sequencer.head == 3)
    [line] = [line for line in caplog.text.splitlines() if "signature is wrong" in line]
    assert f"seq=2 src={SRC}" in line


async def test_a_source_to_sign_for_needs_a_key(run_server: RunServer) -> None:
    with pytest.raises(ConfigError, match=r"--signing-did: got .*--signing-key-file as well"):
        async with run_server(signing_did=SRC):
            pass


async def test_the_own_key_knows_wrong_signatures_of_its_source_without_a_file(
    run_server: RunServer, database: TestDatabase, signing: dict[str, Any]
) -> None:
    good = KEY.sign(unsigned(SRC))
    async with run_server(signing_key_file=signing["signing_key_file"], signing_did=SRC) as server:
        assert (await post(server, good._replace(neg=False)))[0] == 422
        assert (await post(server, good))[0] == 201
    assert stored(database) == [good]


async def test_a_key_that_is_not_the_sources_is_refused_at_the_start(
    run_server: RunServer, signing: dict[str, Any]
) -> None:
    other = SigningKey(b"\2" * 32)
    signing["source_keys_file"].write_text(f"{SRC} {other.did_key}\n")
    with pytest.raises(ConfigError, match=r"--signing-key-file: got .*the public one of this"):
        async with run_server(**signing, signing_did=SRC):
            pass
