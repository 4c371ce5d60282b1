"""`GET /streams` and `DELETE /streams/{id}`."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from sse_labels.publishing.tokens import add_token

from support.database import TestDatabase
from support.reading import reading
from support.server import PUBLISH_TOKEN, RunServer


async def ask(method: str, url: str, token: str = "", **query: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(verify=False) as client:
        return await client.request(method, url, headers=headers, params=query)


async def test_only_admins_are_answered(run_server: RunServer, tmp_path: Path) -> None:
    admin = add_token(tmp_path / "tokens", "olga", ["admin"])
    async with run_server(publish_tokens_file=tmp_path / "tokens") as server:
        for method, path in (("GET", "/streams"), ("DELETE", "/streams/x")):
            url = server.url + path
            assert (await ask(method, url)).status_code == 401
            assert (await ask(method, url, "wrong")).status_code == 401
            assert (await ask(method, url, PUBLISH_TOKEN)).status_code == 403
        assert (await ask("GET", f"{server.url}/streams", admin)).status_code == 200
        for limit in ("0", "1001", "000000001999999", "1_0", "٣", "9" * 5000):
            refused = await ask("GET", f"{server.url}/streams", admin, limit=limit)
            assert (refused.status_code, refused.json()["error"]) == (400, "InvalidRequest")
        assert (await ask("GET", f"{server.url}/streams", admin, sort="x")).status_code == 400


async def test_stream_is_listed_and_cut_by_its_id(
    run_server: RunServer,
    database: TestDatabase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    admin = add_token(tmp_path / "tokens", "olga", ["admin"])
    async with (
        run_server(publish_tokens_file=tmp_path / "tokens") as server,
        reading(server.stream_url, values="spam") as reader,
        reading(server.stream_url) as other,
    ):
        await reader.until_opened()
        await other.until_opened()
        listed = (await ask("GET", f"{server.url}/streams", admin, sort="since")).json()
        assert (listed["total"], listed["silent_workers"]) == (2, [])
        row = listed["streams"][0]
        assert row["filter"] == {"sources": [], "uriPatterns": [], "values": ["spam"]}
        assert (row["peer"], row["state"], row["lag"], row["queued"]) == ("127.0.0.1", "live", 0, 0)
        url = f"{server.url}/streams/{row['id']}"
        assert (await ask("DELETE", url, admin)).status_code == 204
        await reader.until_closed()
        assert reader.news[-1][1]["error"] == "StreamCut"
        again = await ask("DELETE", url, admin)
        assert (again.status_code, again.json()["error"]) == (404, "NoSuchStream")
        database.insert(1)
        await other.until_events(1)
    cut = f"stream cut: id={row['id']} peer=127.0.0.1 by=olga"
    lines = caplog.text.splitlines()
    assert [line.partition(cut)[1:] for line in lines if "stream cut" in line] == [(cut, "")]
    [end] = [line for line in lines if "stream closed" in line and row["id"] in line]
    assert " how=StreamCut " in end
