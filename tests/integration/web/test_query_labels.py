"""`queryLabels` on a real database: the lexicon's shape, every match once, in order of seq."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest

from support.database import TestDatabase
from support.reading import PATIENCE_SECONDS
from support.server import RunServer, Server, until_head

A = "did:plc:" + "a" * 24
B = "did:plc:" + "b" * 24


async def query(server: Server, **parameters: Any) -> dict[str, Any]:
    """Return one page."""
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, verify=False) as client:
        answer = await client.get(
            f"{server.url}/xrpc/com.atproto.label.queryLabels", params=parameters
        )
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    page: dict[str, Any] = answer.json()
    return page


async def every_page(server: Server, **parameters: Any) -> list[list[dict[str, Any]]]:
    """Follow the cursor to the last page."""
    pages = []
    cursor: dict[str, str] = {}
    for _ in range(1000):
        page = await query(server, **parameters, **cursor)
        pages.append(page["labels"])
        if "cursor" not in page:
            return pages
        assert page["cursor"].isdigit()
        cursor = {"cursor": page["cursor"]}
    raise AssertionError("there is no last page")


def labels(database: TestDatabase) -> list[dict[str, Any]]:
    """Every label of the table, by seq."""
    return [event["labels"][0] for event in database.stored()]


async def test_answers_as_the_lexicon_says(server: Server, database: TestDatabase) -> None:
    database.insert(1, cid="bafyreiabc", neg=True, exp="2027-01-01T00:00:00Z", sig=b"\x00\xff")
    database.insert(1)
    await until_head(server, 2)
    assert await query(server, uriPatterns="*") == {"labels": labels(database)}
    assert (await query(server, uriPatterns="*"))["labels"][0] == {
        "ver": 1,
        "src": A,
        "uri": "at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k0",
        "cid": "bafyreiabc",
        "val": "spam",
        "neg": True,
        "cts": "2026-01-01T00:00:00.000Z",
        "exp": "2027-01-01T00:00:00Z",
        "sig": {"$bytes": "AP8"},
    }


async def test_an_empty_table_is_an_empty_page(server: Server) -> None:
    assert await query(server, uriPatterns="*") == {"labels": []}


async def test_following_the_cursor_reaches_every_match_once(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.fill(30)
    expected = labels(database)
    async with run_server() as server:
        for limit in (1, 7, 10, 29, 30, 31, 250):
            pages = await every_page(server, uriPatterns="*", limit=limit)
            assert list(itertools.chain(*pages)) == expected
            sizes = [min(limit, 30 - start) for start in range(0, 30, limit)]
            assert [len(page) for page in pages] == sizes


async def test_without_a_limit_fifty_come(run_server: RunServer, database: TestDatabase) -> None:
    database.fill(260)
    async with run_server() as server:
        page = await query(server, uriPatterns="*")
        assert page == {"labels": labels(database)[:50], "cursor": "50"}
        page = await query(server, uriPatterns="*", limit=250, cursor=5)
        assert page == {"labels": labels(database)[5:255], "cursor": "255"}
        assert await query(server, uriPatterns="*", cursor=260) == {"labels": []}
        assert await query(server, uriPatterns="*", cursor=2**63 - 1) == {"labels": []}


URIS = [
    "at://did:plc:x",
    "at://did:plc:x/app.bsky.feed.post/1",
    "at://did:plc:x/app.bsky.feed.post/10",
    "at://did:plc:xy",
    "AT://did:plc:x",
    "did:plc:x",
    "at://did:plc:z/a_b%c\\d",
    "at://did:plc:z/aXb%c\\d",
    "at://did:plc:z/a_bXc\\d",
    "at://did:plc:z/a_b%cXd",
    # Longer than what the index holds of a URI.
    "at://long/" + "y" * 700 + "/1",
    "at://long/" + "y" * 700 + "/2",
    "at://long/" + "y" * 8000,
]


ASKED: list[dict[str, list[str]]] = [
    {"uriPatterns": [URIS[0]]},
    {"uriPatterns": [URIS[0] + "*"]},
    {"uriPatterns": [URIS[0] + "/*", URIS[5]]},
    {"uriPatterns": [URIS[1], URIS[1], URIS[2], "at://did:plc:x/app.bsky*"]},
    {"uriPatterns": ["at://did:plc:z/a_b%c\\*"]},
    {"uriPatterns": ["at://did:plc:z/a_b*"]},
    {"uriPatterns": [URIS[6]]},
    {"uriPatterns": ["AT*", "did:*"]},
    {"uriPatterns": ["%*"]},
    {"uriPatterns": ["at://long/" + "y" * 700 + "*"]},
    {"uriPatterns": ["at://long/" + "y" * 700 + "/1"]},
    {"uriPatterns": ["at://long/*", URIS[12]]},
    {"uriPatterns": ["*"], "sources": [A]},
    {"uriPatterns": ["*"], "sources": [A, B]},
    {"uriPatterns": ["*"], "sources": ["did:plc:nobody"]},
    {"uriPatterns": ["*"], "values": ["spam", "!hide"], "sources": [B]},
    {"uriPatterns": ["at://did*", URIS[5]], "values": ["porn"], "sources": [A]},
    {"uriPatterns": ["*", URIS[0]]},
]


@pytest.mark.parametrize(("by_ids", "by_uris"), [(10_000, 2500), (20, 12), (3, 1)])
async def test_what_matches_is_what_the_patterns_say(
    run_server: RunServer,
    database: TestDatabase,
    by_ids: int,
    by_uris: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether all rows are looked at for one answer, or so few that many answers hold none."""
    monkeypatch.setattr("sse_labels.feed.store.QUERY_WINDOW", by_ids)
    monkeypatch.setattr("sse_labels.feed.store.URI_WINDOW", by_uris)
    for src, val in ((A, "spam"), (B, "porn"), (B, "!hide"), (A, "porn")):
        database.execute(
            "INSERT INTO label (src, uri, cid, val, cts)"
            " SELECT %s, uri, '', %s, '2026-01-01T00:00:00Z' FROM unnest(%s) AS uri",
            (src, val, URIS),
        )
    stored = labels(database)
    async with run_server() as server:
        for asked in ASKED:
            expected = [label for label in stored if matches(label, asked)]
            pages = await every_page(server, **asked, limit=17)
            assert list(itertools.chain(*pages)) == expected, asked
            if by_ids > len(stored):
                assert await query(server, **asked, limit=250) == {"labels": expected}, asked
                assert all(len(page) == 17 for page in pages[:-1]), asked


def matches(label: dict[str, Any], asked: dict[str, list[str]]) -> bool:
    """What a query lets through, written down a second time and on purpose."""
    return (
        label["src"] in asked.get("sources", [A, B])
        and label["val"] in asked.get("values", ["spam", "porn", "!hide"])
        and any(
            label["uri"].startswith(pattern[:-1])
            if pattern.endswith("*")
            else label["uri"] == pattern
            for pattern in asked["uriPatterns"]
        )
    )


async def test_an_answer_without_labels_has_a_cursor_while_there_is_more_to_look_at(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_labels.feed.store.QUERY_WINDOW", 10)
    database.fill(24)
    database.insert(1, val="rare")
    async with run_server() as server:
        rare = {"uriPatterns": "*", "values": "rare"}
        assert await query(server, **rare) == {"labels": [], "cursor": "10"}
        assert await query(server, **rare, cursor=10) == {"labels": [], "cursor": "20"}
        assert await query(server, **rare, cursor=20) == {"labels": labels(database)[24:]}
        # As many as were asked for: the cursor is the last one's seq, wherever it was looked.
        assert await query(server, **rare, cursor=15, limit=1) == {"labels": labels(database)[24:]}
        some = {"uriPatterns": "*", "values": labels(database)[4]["val"], "limit": 1}
        page = await query(server, **some, cursor=4)
        assert page == {"labels": [labels(database)[4]], "cursor": "5"}


async def test_what_is_not_settled_yet_is_not_shown(server: Server, database: TestDatabase) -> None:
    writer = database.connect(autocommit=False)
    with writer.cursor() as cursor:
        cursor.execute(
            "INSERT INTO label (src, uri, cid, val, cts) VALUES (%s, 'did:plc:x', '', 'late', 'x')",
            (A,),
        )
    database.insert(2)
    server.app.feed.sequencer.wake()
    # Whoever went on from seq 3 now would never see 1.
    assert await query(server, uriPatterns="*") == {"labels": []}
    writer.commit()
    await until_head(server, 3)
    assert await query(server, uriPatterns="*") == {"labels": labels(database)}
    assert labels(database)[0]["val"] == "late"
