"""`POST /labels` on a real database: what is answered is stored, and what is stored is streamed."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest

from support.database import TestDatabase, role, until
from support.reading import PATIENCE_SECONDS, reading
from support.server import PUBLISH_TOKEN, Gate, RunServer, Server, away

SRC = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
LEAST = {"src": SRC, "uri": "did:plc:x", "val": "spam", "cts": "2026-01-01T00:00:00Z"}


async def publish(server: Server, labels: list[dict[str, Any]], **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, verify=False) as client:
        return await client.post(
            f"{server.url}/labels",
            headers={"Authorization": f"Bearer {PUBLISH_TOKEN}", **headers},
            json={"labels": labels},
        )


def values(database: TestDatabase) -> dict[int, str]:
    return {event["seq"]: event["labels"][0]["val"] for event in database.stored()}


async def test_the_seqs_are_those_of_the_table_in_the_order_given(
    server: Server, database: TestDatabase
) -> None:
    database.insert(3)
    given = [f"v{number}" for number in (5, 1, 9, 3, 3, 7)]
    answer = await publish(server, [{**LEAST, "val": val} for val in given])
    assert answer.status_code == 201
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.json() == {"seqs": [4, 5, 6, 7, 8, 9]}
    assert values(database) == {
        **dict.fromkeys((1, 2, 3), "spam"),
        **dict(zip(answer.json()["seqs"], given, strict=True)),
    }


async def test_requests_at_once_do_not_mix_up_their_seqs(
    server: Server, database: TestDatabase
) -> None:
    async with reading(server.stream_url, cursor=0) as reader:
        answers = await asyncio.gather(
            *(
                publish(server, [{**LEAST, "val": f"{who}-{number}"} for number in range(20)])
                for who in range(20)
            )
        )
        await reader.until_events(400)
    assert reader.events == database.stored()
    stored = values(database)
    for who, answer in enumerate(answers):
        seqs = answer.json()["seqs"]
        assert seqs == sorted(seqs)
        assert [stored[seq] for seq in seqs] == [f"{who}-{number}" for number in range(20)]


async def test_ten_thousand_labels_at_once(server: Server, database: TestDatabase) -> None:
    labels = [{**LEAST, "src": "did:web:a.b", "val": str(number)} for number in range(10_000)]
    async with reading(server.stream_url) as reader:
        await reader.until_opened()
        answer = await publish(server, labels)
        assert answer.status_code == 201
        assert answer.json()["seqs"] == list(range(1, 10_001))
        await reader.until_events(10_000)
    assert reader.events == database.stored()
    assert list(values(database).values()) == [label["val"] for label in labels]


async def test_one_bad_label_keeps_all_of_them_out(server: Server, database: TestDatabase) -> None:
    labels = [dict(LEAST) for _ in range(100)]
    labels[57]["cts"] = "yesterday"
    labels[80]["src"] = "nobody"
    answer = await publish(server, labels)
    assert answer.status_code == 422
    assert answer.json()["error"] == "InvalidLabel"
    assert answer.json()["message"].startswith("labels[57].cts: got 'yesterday'")
    assert database.stored() == []
    metrics = server.app.metrics
    assert (metrics.count["labels_published"], metrics.count["labels_refused"]) == (0, 100)
    # Not even an id was taken.
    assert (await publish(server, [LEAST])).json() == {"seqs": [1]}
    assert metrics.count["labels_published"] == 1


FULL = {
    "$type": "com.atproto.label.defs#label",
    "ver": 1,
    "src": "did:web:Example.com%3A8080:a",
    "uri": "https://did.plc.x/App.Bsky.feed.post/3k~_%25?q=''\"\\{}$1%s",
    "cid": "bafyreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
    "val": "!näh 😀 \\ '\" %s {} </script>",
    "neg": True,
    "cts": "2026-02-28T23:59:59.123456789+05:30",
    "exp": "9999-12-31T23:59:59Z",
    "sig": {"$bytes": base64.b64encode(bytes(range(256))).decode()},
}


async def test_every_field_is_stored_as_it_was_given(
    server: Server, database: TestDatabase
) -> None:
    async with reading(server.stream_url, cursor=0) as reader:
        answer = await publish(server, [FULL, LEAST, {**LEAST, "neg": False, "val": "x" * 128}])
        assert answer.status_code == 201, answer.text
        await reader.until_events(3)
    columns = "src, uri, cid, val, neg, cts, exp, sig"
    full, least, third = database.execute(
        f'SELECT {columns}, "signingKeyId" FROM label ORDER BY id'
    )
    assert full[:7] == tuple(FULL[name] for name in columns.split(", ")[:7])
    assert bytes(full[7]) == bytes(range(256))
    assert full[8] is None
    assert least == (SRC, "did:plc:x", "", "spam", None, LEAST["cts"], None, None, None)
    assert (third[3], third[4]) == ("x" * 128, False)
    assert reader.events == database.stored()
    wire = {name: value for name, value in FULL.items() if name != "$type"}
    wire["sig"] = {"$bytes": FULL["sig"]["$bytes"].rstrip("=")}  # type: ignore[index]
    assert reader.events[0]["labels"] == [wire]
    assert reader.events[1]["labels"] == [{"ver": 1, **LEAST}]


async def test_a_signature_comes_back_as_it_was_given(
    server: Server, database: TestDatabase
) -> None:
    sigs = [bytes(range(255, 255 - length, -1)) * 4 for length in (16, 255)]
    sigs += [bytes(range(190, 190 + length)) for length in (1, 2, 3, 64, 65)]
    labels = []
    for sig in sigs:
        padded = base64.b64encode(sig).decode()
        labels += [{**LEAST, "sig": {"$bytes": text}} for text in (padded, padded.rstrip("="))]
    assert (await publish(server, labels)).status_code == 201
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(len(labels))
    assert reader.events == database.stored()
    texts = [event["labels"][0]["sig"]["$bytes"] for event in reader.events]
    assert not any("=" in text for text in texts)
    twice = [sig for sig in sigs for _ in range(2)]
    assert [base64.b64decode(text + "=" * (-len(text) % 4)) for text in texts] == twice
    rows = database.execute("SELECT sig FROM label ORDER BY id")
    assert [bytes(sig) for (sig,) in rows] == twice


async def test_what_is_published_arrives_on_open_streams(
    server: Server, database: TestDatabase
) -> None:
    async with (
        reading(server.stream_url) as everything,
        reading(server.stream_url, values="rude") as filter,
    ):
        await everything.until_opened()
        await filter.until_opened()
        for val in ("spam", "rude", "porn", "rude"):
            assert (await publish(server, [{**LEAST, "val": val}])).status_code == 201
        await everything.until_events(4)
        await filter.until_events(2)
    assert everything.events == database.stored()
    assert filter.events == [event for event in database.stored() if event["seq"] in (2, 4)]


async def test_any_content_type_will_do(server: Server, database: TestDatabase) -> None:
    body = json.dumps({"labels": [LEAST]}).encode()
    async with httpx.AsyncClient(verify=False) as client:
        for content_type in ("application/json", "text/plain", "application/octet-stream", "x"):
            answer = await client.post(
                f"{server.url}/labels",
                headers={"Authorization": f"Bearer {PUBLISH_TOKEN}", "Content-Type": content_type},
                content=body,
            )
            assert answer.status_code == 201
    assert len(database.stored()) == 4


async def test_without_the_database_nothing_is_stored_and_the_client_may_try_again(
    server: Server, database: TestDatabase
) -> None:
    assert (await publish(server, [LEAST])).status_code == 201
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(1)
        with away(database):
            for _ in range(2):
                answer = await publish(server, [LEAST])
                assert answer.status_code == 503
                assert answer.json()["error"] == "NotReady"
                assert int(answer.headers["Retry-After"]) > 0
                # Neither the database's name nor its words are for clients.
                assert database.name not in answer.text
        assert values(database) == {1: "spam"}
        await until(lambda: server.app.feed.sequencer.following)
        assert (await publish(server, [{**LEAST, "val": "back"}])).status_code == 201
        # The stream outlived it.
        await reader.until_events(2)
    assert reader.events == database.stored()


async def test_a_client_that_hangs_up_early_leaves_all_or_nothing(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    table = server.app.label_table
    monkeypatch.setattr(table, "insert", gate.after(table.insert))
    impatient = asyncio.create_task(publish(server, [LEAST] * 10))
    await gate.reached.wait()
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    gate.opened.set()
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(10)
    assert reader.events == database.stored()
    assert len(reader.events) == 10


# What the database allows

RIGHTS_TO_READ = ("SELECT ON label, label_stream",)
RIGHTS_TO_PUBLISH = (
    *RIGHTS_TO_READ,
    "INSERT ON label",
    "USAGE ON SEQUENCE label_id_seq",
    "SELECT, INSERT, UPDATE, DELETE ON label_request",
)


async def test_the_rights_of_the_readme_are_enough_to_publish(
    run_server: RunServer, database: TestDatabase
) -> None:
    with role(database, *RIGHTS_TO_PUBLISH) as dsn:
        async with run_server(dsn) as server:
            for _ in range(2):
                answer = await publish(server, [LEAST], **{"Idempotency-Key": "once"})
                assert (answer.status_code, answer.json()) == (201, {"seqs": [1]})
            await server.app.feed.retention.sweep()
        assert len(database.stored()) == 1


@pytest.mark.parametrize("missing", RIGHTS_TO_PUBLISH[1:])
async def test_a_server_that_may_not_publish_says_so_and_needs_no_restart_once_it_may(
    run_server: RunServer,
    database: TestDatabase,
    missing: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rights = [right for right in RIGHTS_TO_PUBLISH if right != missing]
    key = {"Idempotency-Key": "once"}
    with role(database, *rights) as dsn:
        async with run_server(dsn) as server:
            assert "publishing will be refused" in caplog.text
            answer = await publish(server, [LEAST], **key)
            assert (answer.status_code, answer.json()["error"]) == (403, "Forbidden")
            assert "its log says why" in answer.json()["message"]
            assert "GRANT " in caplog.text
            assert database.stored() == []
            database.execute(f"GRANT {missing} TO role_{database.name}")
            assert (await publish(server, [LEAST], **key)).status_code == 201
    assert len(database.stored()) == 1


async def test_a_table_that_is_not_ours_is_not_published_to(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.execute("DROP FUNCTION label_publish")
    async with run_server() as server:
        assert (await publish(server, [LEAST])).status_code == 403
    assert database.stored() == []
