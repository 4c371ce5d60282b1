"""What an operator's machinery asks: live, ready, metrics."""

from __future__ import annotations

import asyncio
import resource

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from sse_labels.app import App
from sse_labels.config import Settings
from sse_labels.metrics import render

from support.database import TestDatabase, until
from support.reading import reading
from support.server import (
    PUBLISH_TOKEN,
    QUICK,
    RunServer,
    Server,
    away,
    serving,
    until_head,
)


async def get(server: Server, path: str) -> httpx.Response:
    async with httpx.AsyncClient(verify=False) as client:
        return await client.get(server.url + path)


async def families(server: Server) -> dict[str, Metric]:
    """Return what Prometheus would read."""
    answer = await get(server, "/metrics")
    assert answer.status_code == 200
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def sample(found: dict[str, Metric], name: str, **labels: str) -> float:
    """Return the value of one series."""
    [value] = [
        one.value
        for family in found.values()
        for one in family.samples
        if one.name == name and one.labels == labels
    ]
    return float(value)


async def not_ready(server: Server) -> str:
    """Return the reasons why the server is not ready."""
    answer = await get(server, "/health/ready")
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["error"] == "NotReady"
    return str(answer.json()["message"])


async def test_ready_while_it_follows(server: Server, database: TestDatabase) -> None:
    database.insert(3)
    await until_head(server, 3)
    answer = await get(server, "/health/ready")
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json() == {"status": "ready", "head": 3}
    assert (await get(server, "/health/live")).json() == {"status": "live"}


async def test_not_ready_without_the_database_and_ready_again_with_it(
    server: Server, database: TestDatabase
) -> None:
    with away(database):
        await until(lambda: not server.app.feed.sequencer.following)
        assert "not following" in await not_ready(server)
        assert (await get(server, "/health/live")).status_code == 200
        assert sample(await families(server), "sse_labels_following") == 0
    await until(
        lambda: server.app.feed.sequencer.following and server.app.feed.listener.listening.is_set()
    )
    assert (await get(server, "/health/ready")).status_code == 200
    found = await families(server)
    assert sample(found, "sse_labels_following") == 1
    # The sequencer's and the listener's; one may be lost again to a dead connection of the pool.
    assert sample(found, "sse_labels_database_reconnects_total") >= 2


async def test_not_ready_before_the_sequencer_has_a_head(database: TestDatabase) -> None:
    writer = database.connect(autocommit=False)
    with writer.cursor() as cursor:
        cursor.execute("SELECT nextval('label_id_seq')")
    async with serving(App(Settings(**QUICK), database.dsn, PUBLISH_TOKEN)) as server:
        await server.app.feed.listener.listening.wait()
        assert "no head yet" in await not_ready(server)
        assert (await get(server, "/health/live")).status_code == 200
        assert (await get(server, "/metrics")).status_code == 200
        writer.rollback()
        await server.app.feed.sequencer.started.wait()
        await until(lambda: server.app.feed.sequencer.following)
        assert (await get(server, "/health/ready")).json() == {"status": "ready", "head": 1}


async def test_not_ready_while_notifications_do_not_arrive(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = server.app.database.connect

    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(server.app.database, "connect", never)
    database.terminate(database.backends("LISTEN"))
    await until(lambda: not server.app.feed.listener.listening.is_set())
    assert "notifications" in await not_ready(server)
    # Labels come all the same.
    database.insert(2)
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(2)
    assert reader.events == database.stored()
    monkeypatch.setattr(server.app.database, "connect", connect)


async def test_not_ready_while_it_stops(server: Server) -> None:
    server.app.site.health.stopping = True
    assert "stopping" in await not_ready(server)


PROMISED = {
    "connections": "gauge",
    "connections_limit": "gauge",
    "streams": "gauge",
    "streams_limit": "gauge",
    "streams_backfilling": "gauge",
    "streams_ended": "counter",
    "requests_refused": "counter",
    "events_delivered": "counter",
    "bytes_delivered": "counter",
    "events_followed": "counter",
    "backfill_events": "counter",
    "backfill_pages": "counter",
    "ring_hits": "counter",
    "head_seq": "gauge",
    "floor_seq": "gauge",
    "holes_open": "gauge",
    "hole_age_seconds": "gauge",
    "holes": "counter",
    "commit_to_fanout_seconds": "histogram",
    "queue_overflows": "counter",
    "database_reconnects": "counter",
    "publish_requests": "counter",
    "labels_published": "counter",
    "labels_refused": "counter",
    "broken_promises": "counter",
    "following": "gauge",
    "ring_bytes": "gauge",
    "sweep_age_seconds": "gauge",
    "expiries_told": "counter",
    "expiries_scheduled": "gauge",
}
#: Of the process itself, under the names that Prometheus' libraries share.
PROCESS = {
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_cpu_seconds": "counter",
}


async def test_metrics_are_all_there_from_the_start(server: Server) -> None:
    answer = await get(server, "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    found = await families(server)
    got = {name: found[f"sse_labels_{name}"].type for name in PROMISED}
    assert got == PROMISED
    assert {name: found[name].type for name in PROCESS} == PROCESS
    for family in found.values():
        assert family.documentation


async def test_metrics_tell_what_happened(run_server: RunServer, database: TestDatabase) -> None:
    database.insert(4)
    database.execute("UPDATE label_stream SET floor = 3")
    async with run_server(poll_seconds=0.02) as server:
        async with reading(server.stream_url, cursor=2) as reader:
            await reader.until_seq(4)
            database.insert(1)
            await reader.until_seq(5)
            found = await families(server)
            assert sample(found, "sse_labels_streams") == 1
            assert sample(found, "sse_labels_head_seq") == 5
            assert sample(found, "sse_labels_floor_seq") == 3
            assert sample(found, "sse_labels_events_delivered_total") == 3
            assert sample(found, "sse_labels_bytes_delivered_total") > 300
            assert sample(found, "sse_labels_backfill_events_total") == 2
            assert sample(found, "sse_labels_backfill_pages_total") == 1
            assert sample(found, "sse_labels_ring_bytes") > 0
        await until(lambda: not server.app.site.streams.open)
        async with reading(server.stream_url, cursor=4) as reader:
            await reader.until_seq(5)
        await until(lambda: not server.app.site.streams.open)
        await get(server, "/stream?cursor=x")
        found = await families(server)
    assert sample(found, "sse_labels_streams") == 0
    assert sample(found, "sse_labels_streams_ended_total", how="ClientGone") == 2
    assert sample(found, "sse_labels_ring_hits_total") == 1
    assert sample(found, "sse_labels_requests_refused_total", error="InvalidRequest") == 1
    assert reader.events == database.stored(after=4)


async def test_metrics_show_an_open_hole_and_its_age(
    server: Server, database: TestDatabase
) -> None:
    sequencer = server.app.feed.sequencer
    writer = database.connect(autocommit=False)
    with writer.cursor() as cursor:
        cursor.execute("SELECT nextval('label_id_seq')")
    database.insert(1)
    await until(lambda: sequencer.hole_age_seconds() > 0)
    found = await families(server)
    assert sample(found, "sse_labels_holes_open") == 1
    assert 0 < sample(found, "sse_labels_hole_age_seconds") < 20
    assert sample(found, "sse_labels_holes_total") == 1
    assert sample(found, "sse_labels_head_seq") == 0
    writer.rollback()
    await until_head(server, 2)
    found = await families(server)
    assert sample(found, "sse_labels_holes_open") == 0
    assert sample(found, "sse_labels_hole_age_seconds") == 0
    assert sample(found, "sse_labels_head_seq") == 2


async def test_metrics_measure_from_commit_to_fanout(
    server: Server, database: TestDatabase
) -> None:
    assert database.execute("SHOW track_commit_timestamp") == [("on",)]
    async with reading(server.stream_url) as reader:
        await reader.until_opened()
        database.insert(1)
        await reader.until_events(1)
    numbers = server.app.metrics.numbers
    await until(lambda: b"fanout_seconds_count 1.0" in render([numbers()]))
    found = await families(server)
    assert 0 <= sample(found, "sse_labels_commit_to_fanout_seconds_sum") < 20


async def test_a_database_that_does_not_keep_the_time_of_commits_is_not_asked(
    server: Server, database: TestDatabase
) -> None:
    server.app.schema.has_commit_time = False
    async with reading(server.stream_url) as reader:
        await reader.until_opened()
        for count in (1, 2):
            database.insert(1)
            # The second is handed out after the first would have been measured.
            await reader.until_events(count)
    found = await families(server)
    assert sample(found, "sse_labels_commit_to_fanout_seconds_count") == 0
    assert reader.events == database.stored()


async def test_metrics_show_limits_beside_what_they_limit(run_server: RunServer) -> None:
    async with (
        run_server(max_connections=40, max_streams=30) as server,
        reading(server.stream_url) as reader,
    ):
        await reader.until_opened()
        found = await families(server)
    assert sample(found, "sse_labels_streams") == 1
    assert sample(found, "sse_labels_streams_limit") == 30
    # The reader's and the scrape's.
    assert sample(found, "sse_labels_connections") == 2
    assert sample(found, "sse_labels_connections_limit") == 40
    assert 0 < sample(found, "process_open_fds") <= sample(found, "process_max_fds")


async def test_metrics_show_the_limit_of_connections_that_descriptors_allow(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    async with run_server(max_connections=16_000) as server:
        found = await families(server)
    assert 500 < sample(found, "sse_labels_connections_limit") < 1024
