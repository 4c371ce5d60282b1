"""What all answers have in common."""

from __future__ import annotations

import json
from typing import Any

import httpx

from support.server import PUBLISH_TOKEN, RunServer

PUBLISHER = {"Authorization": f"Bearer {PUBLISH_TOKEN}"}
LABEL = {
    "src": "did:web:labeler.example",
    "uri": "did:web:account.example",
    "val": "spam",
    "cts": "2026-01-01T00:00:00Z",
}
#: Requests of each kind of answer, by status.
REQUESTS: list[tuple[int, str, str, dict[str, Any]]] = [
    (200, "GET", "/health/live", {}),
    (200, "GET", "/health/ready", {}),
    (200, "GET", "/xrpc/com.atproto.label.queryLabels?uriPatterns=*", {}),
    (201, "POST", "/labels", {"json": {"labels": [LABEL]}, "headers": PUBLISHER}),
    (400, "GET", "/stream?cursor=x", {}),
    (401, "POST", "/labels", {"json": {"labels": [LABEL]}}),
    (404, "GET", "/nothing", {}),
    (405, "DELETE", "/labels", {}),
    (422, "POST", "/labels", {"json": {"labels": [{}]}, "headers": PUBLISHER}),
    # By what reads requests, before they have a handler.
    (431, "GET", "/", {"headers": {"X-Long": "x" * 100_000}}),
]


async def test_every_json_answer_ends_with_one_line_feed(run_server: RunServer) -> None:
    async with run_server() as server, httpx.AsyncClient(base_url=server.url) as client:
        for status, method, path, more in REQUESTS:
            answer = await client.request(method, path, **more)
            assert answer.status_code == status, (path, answer.text)
            assert answer.headers["content-type"].startswith("application/json")
            assert answer.text == f"{answer.text.rstrip()}\n", path
            assert isinstance(json.loads(answer.text), dict)


async def test_answer_of_a_full_server_ends_with_one_line_feed(run_server: RunServer) -> None:
    async with (
        run_server(max_connections=1) as server,
        httpx.AsyncClient() as client,
        client.stream("GET", server.stream_url) as stream,
        httpx.AsyncClient() as other,
    ):
        await anext(stream.aiter_lines())
        answer = await other.get(f"{server.url}/health/live")
    assert answer.status_code == 503
    assert answer.text == f"{answer.text.rstrip()}\n"
