"""What the log says of a stream: one line when it opens, one when it closes, with why."""

from __future__ import annotations

import json
import logging
import re
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from sse_labels.errors import StreamClosed
from sse_labels.logs import FIELD_MAX_CHARS

from support.database import TestDatabase, until
from support.program import QUICK_SERVER, running
from support.reading import reading
from support.server import RunServer

CLOSED = [each for each in StreamClosed.__subclasses__() if each.name]


def lines_of(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [line for line in caplog.text.splitlines() if f": {what}" in line]


async def test_every_line_is_one_json_object(database: TestDatabase, tmp_path: Path) -> None:
    options = ("--log-format=json", "--dsn", database.dsn)
    with running("serve", *QUICK_SERVER, *options) as program:
        found = program.wait_for(r"http://127\.0\.0\.1:\d+")
        async with reading(f"{found[0]}/stream", cursor=0, values="spam") as reader:
            await reader.until_opened()
        program.wait_until(lambda: "ClientGone" in program.errors)
        async with reading(f"{found[0]}/stream") as reader:
            await reader.until_opened()
            program.end()
    lines = [json.loads(line) for line in program.err]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[0-9:.]+(Z|\+00:00)", line["time"])
    opened = [line for line in lines if line["message"].startswith("stream opened")]
    closed = [line for line in lines if line["message"].startswith("stream closed")]
    assert [line["how"] for line in closed] == ["ClientGone", "ServerStopping"]
    assert [line["id"] for line in opened] == [line["id"] for line in closed]
    assert [line["cursor"] for line in opened] == [0, None]
    assert {line["peer"] for line in opened} == {"127.0.0.1"}


@pytest.mark.parametrize("closed", CLOSED, ids=lambda closed: closed.name)
async def test_stream_that_is_ended_says_why_in_one_line(
    closed: type[StreamClosed], run_server: RunServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with run_server() as server:
        async with reading(server.stream_url) as reader:
            await reader.until_opened()
            [visit] = server.app.site.streams.open.values()
            visit.outbox.close(closed("as the test wants it"))
            await reader.until_closed()
        await until(lambda: not server.app.site.streams.open)
    [opened], [ended] = lines_of(caplog, "stream opened"), lines_of(caplog, "stream closed")
    assert f"how={closed.name} " in ended
    assert opened.rpartition("id=")[2] == ended.rpartition("id=")[2]


async def test_refused_request_opens_no_stream_and_writes_no_line_of_one(
    run_server: RunServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with run_server() as server, httpx.AsyncClient() as client:
        assert (await client.get(server.stream_url, params={"cursor": "x"})).status_code == 400
    assert lines_of(caplog, "stream ") == []


async def test_flood_of_one_address_costs_few_and_short_lines(database: TestDatabase) -> None:
    lines, streams = 20, 50
    options = (f"--log-lines-per-address={lines}", "--dsn", database.dsn)
    # The longest filter that a request line of 8,190 bytes can bring.
    query = "&".join(f"values={number:0>120}" for number in range(60))
    with running("serve", *QUICK_SERVER, *options) as program:
        url = program.wait_for(r"http://127\.0\.0\.1:\d+")[0]
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=20))
            for _ in range(streams):
                await stack.enter_async_context(client.stream("GET", f"{url}/stream?{query}"))
            metrics = (await client.get(f"{url}/metrics")).text
        program.end()
    opened = [line for line in program.err if " stream opened: " in line]
    closed = [line for line in program.err if " stream closed: " in line]
    assert len(opened) == len(closed) == lines // 2
    assert all(" filter=" in line and len(line) < 2 * FIELD_MAX_CHARS for line in opened)
    ids = [[line.rpartition("id=")[2] for line in found] for found in (opened, closed)]
    assert sorted(ids[0]) == sorted(ids[1])
    assert f"sse_labels_log_lines_left_out_total {streams - lines // 2}.0" in metrics
