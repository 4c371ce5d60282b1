"""What Ozone's own test of its sequencer asks for, asked of the whole service over HTTP.

Source of the scenarios: bluesky-social/atproto, packages/ozone/tests/sequencer.test.ts.
Ours keeps every row, so where a negation replaced its label there, both arrive here.
"""

from __future__ import annotations

import asyncio

import pytest

from support.database import TestDatabase, until
from support.reading import Reader, reading
from support.server import Gate, RunServer, Server, insert_large, until_head


def making(database: TestDatabase, count: int) -> asyncio.Task[list[int]]:
    """Make labels beside the test, each in a transaction of its own."""
    return asyncio.create_task(asyncio.to_thread(database.insert, count))


async def test_sends_what_was_there_before(run_server: RunServer, database: TestDatabase) -> None:
    database.insert(20)
    async with run_server() as server, reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(20)
    assert reader.events == database.stored()


async def test_a_negation_comes_after_the_label_it_negates(
    server: Server, database: TestDatabase
) -> None:
    seqs = database.insert(5)
    for number in range(2):
        seqs += database.insert(
            1, uri=f"at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k{number}", neg=True
        )
    async with reading(server.stream_url, cursor=0) as reader:
        await reader.until_events(7)
    assert reader.events == database.stored()
    labels = [event["labels"][0] for event in reader.events]
    assert ["neg" in label for label in labels] == [False] * 5 + [True] * 2
    assert [label["uri"] for label in labels[5:]] == [label["uri"] for label in labels[:2]]


async def test_goes_over_from_history_to_live_while_labels_are_made(
    run_server: RunServer, database: TestDatabase
) -> None:
    database.insert(20)
    async with run_server(page_max_events=3) as server:
        made = making(database, 20)
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_events(40)
            await made
            # Nothing else is on its way: this one comes next.
            database.insert(1)
            await reader.until_events(41)
    assert reader.events == database.stored()


async def test_sends_only_what_comes_after_the_cursor(
    run_server: RunServer, database: TestDatabase
) -> None:
    cursor = database.insert(20)[-1]
    async with run_server() as server:
        made = making(database, 20)
        async with reading(server.stream_url, cursor=cursor) as reader:
            await reader.until_events(20)
            await made
    assert reader.events == database.stored(after=cursor)


async def test_keeps_what_is_not_being_read(run_server: RunServer, database: TestDatabase) -> None:
    async with (
        run_server(send_buffer_bytes=4096, page_max_events=5) as server,
        reading(server.stream_url, cursor=0) as reader,
    ):
        await reader.until_opened()
        insert_large(database, 5)
        await reader.until_events(5)
        # Read no further: the kernel's buffers fill up, and then the outbox.
        insert_large(database, 200)
        await until_head(server, 205)
        [outbox] = [visit.outbox for visit in server.app.site.streams.open.values()]
        assert outbox.queued > 20
        await reader.until_events(205)
        assert outbox.queued == 0
    assert reader.events == database.stored()


async def test_a_consumer_that_lets_its_outbox_fill_up_is_told_so(
    run_server: RunServer, database: TestDatabase
) -> None:
    async with (
        run_server(send_buffer_bytes=4096, page_max_events=5, outbox_max_events=20) as server,
        reading(server.stream_url, cursor=0) as reader,
    ):
        await reader.until_opened()
        insert_large(database, 5)
        await reader.until_events(5)
        insert_large(database, 200)
        await until(lambda: server.app.metrics.count["queue_overflows"] == 1)
        error = await reader.until_news("error")
        await reader.until_closed()
        assert error["error"] == "ConsumerTooSlow"
        assert error["cursor"] == reader.events[-1]["seq"] < 205
        # Not while the sequencer is still ahead: it would be too much again.
        await until_head(server, 205)
        async with reading(server.stream_url, last_event_id=reader.last_id) as again:
            await again.until_seq(205)
    assert reader.events + again.events == database.stored()


async def test_serves_many_connections_at_once(
    run_server: RunServer, database: TestDatabase
) -> None:
    cursor = database.insert(20)[-1]
    async with run_server() as server:

        async def read() -> Reader:
            async with reading(server.stream_url, cursor=cursor) as reader:
                await reader.until_events(20)
            return reader

        made = making(database, 20)
        readers = await asyncio.gather(*(read() for _ in range(50)))
        await made
    expected = database.stored(after=cursor)
    assert all(reader.events == expected for reader in readers)


@pytest.mark.parametrize("order", ["after the page was read", "before the page is read"])
async def test_live_event_during_cutover_of_a_real_stream_is_delivered_once(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    database.insert(10)
    async with run_server() as server:
        gate = Gate()
        pages = server.app.feed.pages
        held = gate.after if order.startswith("after") else gate.before
        monkeypatch.setattr(pages, "read", held(pages.read))
        async with reading(server.stream_url, cursor=0) as reader:
            await reader.until_opened()
            await gate.reached.wait()
            database.insert(5)
            await until_head(server, 15)
            gate.opened.set()
            await reader.until_events(15)
            # Live by now; and were one sent twice, it would come before this one.
            database.insert(1)
            await reader.until_seq(16)
        assert server.app.metrics.count["backfill_pages"] == 1
    assert reader.events == database.stored()
    assert [event["seq"] for event in reader.events] == list(range(1, 17))


async def test_labels_made_while_the_consumer_takes_its_history_are_delivered_once(
    run_server: RunServer, database: TestDatabase
) -> None:
    insert_large(database, 100)
    async with (
        run_server(send_buffer_bytes=4096, page_max_events=20) as server,
        reading(server.stream_url, cursor=0) as reader,
    ):
        await reader.until_opened()
        # Stuck in the middle of its history; nobody reads.
        await until(lambda: server.app.metrics.events_delivered > 0)
        made = making(database, 20)
        await until_head(server, 120)
        await made
        [outbox] = [visit.outbox for visit in server.app.site.streams.open.values()]
        assert not outbox.caught_up
        await reader.until_events(120)
        database.insert(1)
        await reader.until_seq(121)
    assert reader.events == database.stored()
