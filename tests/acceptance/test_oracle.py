"""The oracle itself: it complains when it should, and only then."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import psycopg2
import pytest
from oracle import choose_seed
from oracle.consumers import Wanted
from oracle.databases import drop, own_postgres
from oracle.stage import staged
from oracle.verdict import Entry, Published, judge, judge_published
from oracle.wire import Chunked, Event, EventStream, WireError
from oracle.writers import BrokenFollower, Writer
from psycopg2.extensions import make_dsn

from sse_labels.embedded import EmbeddedPostgres

from support.database import TestDatabase, expected_event

TRUTH = {
    seq: expected_event(
        seq, f"did:plc:{'ab'[seq % 2] * 24}", f"at://x/{seq}", "", "spam", False, "2026", "", None
    )
    for seq in (1, 2, 5, 6, 9)
}
GOOD = [Entry(seq, json.dumps(event)) for seq, event in TRUTH.items()]


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with own_postgres() as server:
        yield server


def test_complete_transcript_is_not_complained_about() -> None:
    assert not judge("who", GOOD, TRUTH)
    assert not judge("who", GOOD[2:], TRUTH, start=2)


def test_lost_event_is_complained_about() -> None:
    for place in range(len(GOOD)):
        findings = judge("who", GOOD[:place] + GOOD[place + 1 :], TRUTH)
        assert findings
        assert findings.lost == [GOOD[place].seq]


def test_doubled_event_is_complained_about() -> None:
    findings = judge("who", [*GOOD[:3], GOOD[1], *GOOD[3:]], TRUTH)
    assert findings
    assert findings.duplicated == [2]
    assert not findings.lost


def test_swapped_events_are_complained_about() -> None:
    findings = judge("who", [GOOD[0], GOOD[2], GOOD[1], *GOOD[3:]], TRUTH)
    assert findings
    assert findings.out_of_order == [2]
    assert not findings.lost


@pytest.mark.parametrize("change", [("src", "val"), ("labels", "label"), (" ", ""), ('"ver":', "")])
def test_altered_event_is_complained_about(change: tuple[str, str]) -> None:
    seq, data = GOOD[2]
    altered = data.replace(*change, 1)
    expect = [] if change == (" ", "") else [5]
    assert judge("who", [*GOOD[:2], Entry(seq, altered), *GOOD[3:]], TRUTH).altered == expect


def test_event_that_the_filter_hides_is_complained_about() -> None:
    wanted = Wanted(sources=("did:plc:" + "b" * 24,))
    passing = [entry for entry in GOOD if entry.seq % 2]
    assert not judge("who", passing, TRUTH, passes=wanted.passes)
    assert judge("who", GOOD, TRUTH, passes=wanted.passes).unexpected == [2, 6]


def test_event_that_was_never_stored_is_complained_about() -> None:
    assert judge("who", [*GOOD, Entry(10, GOOD[0].data)], TRUTH).unexpected == [10]


def test_wrongly_stored_publish_is_complained_about() -> None:
    uris = ["at://x/1", "at://x/2"]
    assert judge_published([Published("k", uris, [1, 2])], TRUTH) == []
    assert judge_published([Published("k", uris)], TRUTH) == []
    assert judge_published([Published("k", ["at://y", "at://z"])], TRUTH) == []
    assert judge_published([Published("k", uris, [1, 5])], TRUTH), "another seq than answered"
    assert judge_published([Published("k", ["at://y"], [3])], TRUTH), "answered, not stored"
    assert judge_published([Published("k", ["at://x/1", "at://y"])], TRUTH), "a half"
    twice = {**TRUTH, 11: TRUTH[1]}
    assert judge_published([Published("k", uris, [1, 2])], twice), "stored twice"
    assert judge_published([Published("k", ["at://x/1"])], twice), "stored twice, unanswered"


def test_wire_reads_the_same_however_it_is_cut() -> None:
    stream = (
        b"retry: 20\n: hello\n\nid: 7\n\nid: 8\r\ndata: a\r\ndata: \xc3\xa4\r\n\r\n"
        b"event: info\rdata:x\r\r:\n\nid: 9\ndata: lost, no empty line"
    )
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (stream[:31], stream[31:]))
    framed += b"0\r\n\r\n"
    for size in (1, 2, 3, 7, len(framed)):
        chunked, events = Chunked(), EventStream()
        got: list[Event] = []
        for at in range(0, len(framed), size):
            got += events.feed(chunked.feed(framed[at : at + size]))
        assert got == [Event("message", "8", "a\nä"), Event("info", "8", "x")]
        assert chunked.ended
        assert (events.last_id, events.retry_ms, events.comments) == ("8", 20, 2)


def test_start_of_a_stream_is_known_however_soon_its_first_label_comes() -> None:
    for stream, start in (
        (b"retry: 20\nid: 7\nevent: info\ndata: i\n\nid: 8\ndata: a\n\nid: 9\n\n", "7"),
        (b"retry: 20\n\nid: 8\ndata: a\n\nid: 9\n\n", ""),
    ):
        for size in (1, len(stream)):
            events = EventStream()
            for at in range(0, len(stream), size):
                events.feed(stream[at : at + size])
            assert events.opened_at == start


@pytest.mark.parametrize("broken", [b"xyz\r\n", b"3\r\nabcd\r\n", b"-1\r\n", b"\r\n"])
def test_broken_chunks_are_complained_about(broken: bytes) -> None:
    with pytest.raises(WireError):
        Chunked().feed(broken + b"1\r\na\r\n")


async def test_follower_by_greater_id_is_caught(postgres: EmbeddedPostgres) -> None:
    seed = choose_seed()
    async with staged(postgres, seed) as stage:
        database = stage.database
        stop, stop_following = threading.Event(), threading.Event()
        reading = database.connect()

        def fetch(last: int) -> list[Entry]:
            with reading.cursor() as cursor:
                cursor.execute(
                    "SELECT id, src, uri, cid, val, neg, cts, exp, sig FROM label"
                    " WHERE id > %s ORDER BY id",
                    (last,),
                )
                return [Entry(row[0], json.dumps(expected_event(*row))) for row in cursor]

        follower = BrokenFollower(fetch, stop_following)
        follower.start()
        writers = [Writer(f"writer{n}", seed, database.dsn, stop, 0.005) for n in range(3)]
        for writer in writers:
            writer.start()
        stop.wait(1.5)
        stop.set()
        for writer in writers:
            writer.join()
            writer.finish()
        stop_following.set()
        follower.join()
        truth = {event["seq"]: event for event in database.stored()}
        findings = judge("id > last", follower.transcript, truth)
        assert findings.lost, f"{len(truth)} labels, seed {seed}"
        assert not findings.altered


async def test_run_without_a_fault_is_clean(postgres: EmbeddedPostgres) -> None:
    async with staged(postgres, choose_seed()) as stage:
        await stage.begin()
        before = len(stage.consumers[0].transcript)
        await stage.inject("nothing", _nothing)
        verdict = await stage.end()
        assert verdict.clean, verdict
        assert verdict.delivered > before
        assert verdict.labels > 0
        for consumer, findings in zip(stage.consumers, verdict.findings, strict=True):
            assert (findings.expected == 0) == (consumer.name == "of-nothing"), findings


async def _nothing() -> None:
    return


def test_leftovers_of_a_stage_are_dropped(postgres: EmbeddedPostgres) -> None:
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute("CREATE DATABASE left_behind")
        database = TestDatabase(make_dsn(postgres.dsn, dbname="left_behind"), "left_behind")
        writing = database.connect(autocommit=False)
        with writing.cursor() as inside:
            inside.execute("CREATE TABLE x ()")
            inside.execute("PREPARE TRANSACTION 'left'")
        drop(postgres, "left_behind")
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'left_behind'")
        assert cursor.fetchall() == []
    admin.close()
    database.close()
