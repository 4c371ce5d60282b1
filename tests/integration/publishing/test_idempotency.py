"""A publish that is tried again stores nothing twice."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from support.database import TestDatabase
from support.server import PUBLISH_TOKEN, Server

LABEL = {
    "src": "did:web:labeler.example",
    "uri": "did:web:account.example",
    "val": "spam",
    "cts": "2026-01-01T00:00:00Z",
}


async def publish(server: Server, labels: list[dict[str, Any]], *keys: str) -> httpx.Response:
    headers = [("Authorization", f"Bearer {PUBLISH_TOKEN}")]
    headers += [("Idempotency-Key", key) for key in keys]
    async with httpx.AsyncClient() as client:
        return await client.post(f"{server.url}/labels", json={"labels": labels}, headers=headers)


async def test_same_key_and_labels_answer_the_same_seqs_and_store_once(
    server: Server, database: TestDatabase
) -> None:
    first = await publish(server, [LABEL, {**LABEL, "val": "rude"}], "a-key")
    again = await publish(server, [LABEL, {**LABEL, "val": "rude"}], "a-key")
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json() == {"seqs": [1, 2]}
    assert [event["seq"] for event in database.stored()] == [1, 2]


async def test_same_key_at_the_same_time_stores_once(
    server: Server, database: TestDatabase
) -> None:
    answers = await asyncio.gather(*(publish(server, [LABEL], "a-key") for _ in range(8)))
    assert [answer.json() for answer in answers] == [{"seqs": [1]}] * 8
    assert len(database.stored()) == 1


async def test_same_key_with_other_labels_is_refused(
    server: Server, database: TestDatabase
) -> None:
    await publish(server, [LABEL], "a-key")
    answer = await publish(server, [{**LABEL, "val": "rude"}], "a-key")
    assert (answer.status_code, answer.json()["error"]) == (422, "IdempotencyKeyReused")
    assert len(database.stored()) == 1


async def test_a_request_that_was_refused_leaves_its_key_free(
    server: Server, database: TestDatabase
) -> None:
    assert (await publish(server, [{**LABEL, "val": ""}], "a-key")).status_code == 422
    assert (await publish(server, [LABEL], "a-key")).status_code == 201
    assert len(database.stored()) == 1


async def test_without_a_key_each_request_stores(server: Server, database: TestDatabase) -> None:
    await publish(server, [LABEL])
    await publish(server, [LABEL])
    assert len(database.stored()) == 2


@pytest.mark.parametrize("keys", [("",), ("x" * 256,), ("a", "b")])
async def test_bad_key_is_refused(
    server: Server, database: TestDatabase, keys: tuple[str, ...]
) -> None:
    answer = await publish(server, [LABEL], *keys)
    assert (answer.status_code, answer.json()["error"]) == (400, "InvalidRequest")
    assert database.stored() == []


async def test_old_keys_are_forgotten(server: Server, database: TestDatabase) -> None:
    await publish(server, [LABEL], "a-key")
    database.execute("UPDATE label_request SET at = at - interval '2 days'")
    await server.app.feed.retention.sweep()
    assert database.execute("SELECT count(*) FROM label_request") == [(0,)]
