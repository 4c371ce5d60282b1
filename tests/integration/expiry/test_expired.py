"""`expired`: whoever asks is told when a label in force expires; the clock is the test's own."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import aiohttp
import jwt
import pytest

from sse_labels.database.queries import block
from sse_labels.expiry.expiry import HORIZON_SECONDS
from sse_labels.protocol import notice, xrpc

from support.clock import NOON, Clock, at
from support.database import OZONE_TABLES, TestDatabase, role, until
from support.reading import PATIENCE_SECONDS, Reader, reading
from support.server import Gate, RunServer, Server, away, until_head

SIG = bytes(range(64))
Key = tuple[str, str, str, str]
OFFSETS = ("Z", "+00:00", "+14:00", "-11:30", "+23:59", "-23:59")


def key_of(label: dict[str, Any]) -> Key:
    return label["src"], label["uri"], label.get("cid", ""), label["val"]


def expired(stream: Reader) -> list[dict[str, Any]]:
    """What the stream was told, as events."""
    return [
        {"seq": news["seq"], "labels": [news["label"]]}
        for kind, news in stream.news
        if kind == "info" and news["name"] == "LabelExpired"
    ]


async def until_expired(stream: Reader, count: int) -> list[dict[str, Any]]:
    await stream.until(lambda: len(expired(stream)) >= count)
    return expired(stream)


@asynccontextmanager
async def live(server: Server, **query: Any) -> AsyncIterator[Reader]:
    """A stream that has begun to ask, and is live."""
    streams = server.app.site.streams.open
    before = set(streams)
    async with reading(server.stream_url, **{"expired": "live", **query}) as stream:
        [new] = set(streams) - before
        await until(lambda: streams[new].outbox._parked is not None)
        yield stream


def askers(server: Server) -> list[Any]:
    return [each for group in server.app.expiry._readers.values() for each in group]


def scheduled(server: Server) -> float:
    return server.app.metrics.gauges["expiries_scheduled"]()


async def test_what_expires_is_told_to_those_who_ask_and_the_cursor_does_not_move(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    [old] = database.insert(1, exp=at(10), sig=SIG, cid="bafyreib2rxk3rh6kzwq")
    await until_head(server, old)
    async with live(server) as stream, reading(server.stream_url) as other:
        await other.until_opened()
        [new] = database.insert(1, exp=at(5), val="rude")
        await stream.until_seq(new)
        clock.set(4.999)
        await until(lambda: scheduled(server) == 2)
        clock.set(5)
        assert await until_expired(stream, 1) == database.stored(old)
        clock.set(10)
        assert await until_expired(stream, 2) == [*database.stored(old), database.stored()[0]]
        assert int(stream.last_id) == new
        [last] = database.insert(1)
        assert await other.until_seq(last) == database.stored(old)
        assert other.news == []
        assert stream.news[0][1]["message"] == f"the label of seq {new} has expired"
        assert server.app.metrics.count["expiries_told"] == 2
    await until(lambda: not askers(server))
    assert scheduled(server) == 0


def truth(database: TestDatabase, since: float, until: float) -> list[dict[str, Any]]:
    """What the table says has expired in force between two times, as it must be told."""
    newest: dict[Key, dict[str, Any]] = {}
    for event in database.stored():
        newest[key_of(event["labels"][0])] = event
    over = []
    for event in newest.values():
        [label] = event["labels"]
        if "exp" in label and not label.get("neg"):
            when = datetime.fromisoformat(label["exp"]).timestamp() - NOON
            if since < when <= until:
                over.append((when, event["seq"], event))
    return [event for _, _, event in sorted(over, key=lambda one: one[:2])]


def write(database: TestDatabase, chance: random.Random, count: int, low: int, high: int) -> None:
    """Store labels of a few keys that expire between two times, or never, or are negations."""
    for _ in range(count):
        exp = at(chance.randrange(low, high), chance.choice(OFFSETS))
        database.insert(
            1,
            uri=f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{chance.randrange(4 * count)}",
            val=chance.choice(["spam", "rude"]),
            neg=chance.random() < 0.1,
            exp=chance.choice([exp, exp, exp, None]),
        )


async def test_all_that_expires_is_told_in_the_order_of_time_whatever_the_offset(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    write(database, random.Random(1), 40, 1, 100)
    await until_head(server, 40)
    async with live(server) as stream:
        write(database, random.Random(2), 40, 1, 100)
        await stream.until_seq(80)
        wanted = truth(database, 0, 100)
        assert len(wanted) > 30
        for now in range(0, 101, 10):
            clock.set(now)
            count = len(truth(database, 0, now))
            assert await until_expired(stream, count) == wanted[:count]
        assert expired(stream) == wanted


async def test_a_time_of_the_year_0_or_without_an_offset_is_told_as_any_other(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(server)
    exps = ["0000-01-01T00:00:01+00:00", "0001-01-01T00:00:00Z", at(5).removesuffix("Z"), at(5)]
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    try:
        time.tzset()
        for number, exp in enumerate(exps):
            database.insert(1, uri=f"at://a/{number}", exp=exp)
        await until_head(server, len(exps))
        clock.set(4.999)
        async with live(server, expired="0000-01-01T00:00:00Z") as stream:
            assert await until_expired(stream, 2) == database.stored()[:2]
            clock.set(5)
            assert await until_expired(stream, 4) == database.stored()
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_only_what_a_filter_lets_through_is_told(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    async with live(server, values="rude") as rude, live(server) as stream:
        for val, seconds in (("spam", 1), ("rude", 2), ("spam", 3), ("rude", 4)):
            database.insert(1, uri=f"at://a/{seconds}", val=val, exp=at(seconds))
        await until_head(server, 4)
        clock.set(4)
        await until_expired(stream, 4)
        wanted = [e for e in database.stored() if e["labels"][0]["val"] == "rude"]
        assert await until_expired(rude, 2) == wanted
        assert expired(stream) == database.stored()


async def test_a_token_narrows_what_is_told(run_server: RunServer, database: TestDatabase) -> None:
    now = time.time()
    secret, a, b = "0123456789abcdef0123456789abcdef", f"did:plc:{'a' * 24}", f"did:plc:{'b' * 24}"
    claims = {"iat": now, "exp": now + 60, "sources": [a]}
    token = jwt.encode(claims, secret, "HS256")
    async with run_server(jwt_secret=secret) as server:
        clock = Clock(server)
        clock.set(10)
        database.insert(1, src=b, exp=at(1))
        database.insert(1, src=a, exp=at(2))
        await until_head(server, 2)
        async with live(server, access_token=token, expired=at(0)) as stream:
            await until_expired(stream, 1)
            database.insert(1, src=b, exp=at(11))
            [last] = database.insert(1, src=a, uri="at://a/b", exp=at(12))
            await until_head(server, last)
            clock.set(12)
            await until_expired(stream, 2)
        of_a = [e for e in database.stored() if e["labels"][0]["src"] == a]
        assert expired(stream) == of_a


async def test_what_is_negated_before_it_expires_is_not_told(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    async with live(server) as stream:
        database.insert(2, exp=at(5))
        database.insert(1, neg=True)
        await until_head(server, 3)
        clock.set(5)
        assert await until_expired(stream, 1) == [database.stored()[1]]
        [last] = database.insert(1)
        await stream.until_seq(last)
        assert len(expired(stream)) == 1


async def test_a_label_that_is_given_anew_is_told_once_at_the_later_time(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    database.insert(1, exp=at(5))
    await until_head(server, 1)
    async with live(server) as stream:
        database.insert(1, exp=at(20))
        database.insert(1, exp=at(6), val="rude")
        await until_head(server, 3)
        clock.set(6)
        assert await until_expired(stream, 1) == database.stored(2)
        clock.set(20)
        assert await until_expired(stream, 2) == [database.stored(2)[0], database.stored(1)[0]]


async def test_a_label_that_comes_while_the_database_is_asked_takes_the_place_of_the_old_one(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(server)
    async with live(server) as stream:
        database.insert(1, exp=at(5))
        database.insert(1, exp=at(5), val="rude")
        await until_head(server, 2)
        gate = Gate()
        monkeypatch.setattr(
            server.app.feed.store,
            "still_in_force",
            gate.after(server.app.feed.store.still_in_force),
        )
        clock.set(5)
        await gate.reached.wait()
        database.insert(1, exp=at(100))
        await until_head(server, 3)
        gate.opened.set()
        assert await until_expired(stream, 1) == [database.stored()[1]]


async def test_a_consumer_in_backfill_is_told_once_it_is_live_after_the_label(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.insert(3, exp=at(5))
    database.insert(1, exp=at(6), val="rude")
    async with run_server(ring_max_bytes=0) as server:
        clock = Clock(server)
        gate = Gate()
        monkeypatch.setattr(server.app.feed.store, "page", gate.before(server.app.feed.store.page))
        async with reading(server.stream_url, cursor=0, expired="live") as stream:
            await stream.until_opened()
            await gate.reached.wait()
            async with live(server) as other:
                clock.set(10)
                await until_expired(other, 4)
            # In the meantime a newer label takes the place of the last one: it is not over.
            database.insert(1, exp=at(100), val="rude")
            await until_head(server, 5)
            gate.opened.set()
            assert await until_expired(stream, 3) == truth(database, 0, 10)
            assert stream.events == database.stored()
            assert int(stream.last_id) == 5


@pytest.mark.parametrize("seed", range(4))
async def test_a_time_tells_of_all_that_expired_since_from_the_table_then_live(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("sse_labels.expiry.expiry.PAGE_LABELS", 3)
    monkeypatch.setattr("sse_labels.expiry.expiry.RUN_LABELS", 8)
    monkeypatch.setattr("sse_labels.expiry.expiry.LOAD_ROWS", 7)
    monkeypatch.setattr("sse_labels.expiry.expiry.CHECKED_AT_ONCE", 2)
    clock = Clock(server)
    write(database, random.Random(seed), 60, -200_000, 200)
    await until_head(server, 60)
    async with (
        live(server, expired=at(-150_000, "+02:00")) as stream,
        live(server, values="rude", expired=at(-100_000)) as rude,
    ):
        past = truth(database, -150_000, 0)
        assert len(past) > 15
        assert await until_expired(stream, len(past)) == past
        clock.set(200)
        wanted = truth(database, -150_000, 200)
        assert await until_expired(stream, len(wanted)) == wanted
        wanted = [e for e in truth(database, -100_000, 200) if e["labels"][0]["val"] == "rude"]
        assert await until_expired(rude, len(wanted)) == wanted


async def test_a_client_that_comes_back_with_its_time_misses_nothing(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    seen: dict[int, dict[str, Any]] = {}
    for now in range(0, 100, 20):
        clock.set(now)
        write(database, random.Random(now), 10, now + 1, now + 50)
        async with reading(server.stream_url, expired=at(0)) as stream:
            count = len(truth(database, 0, now))
            seen |= {event["seq"]: event for event in await until_expired(stream, count)}
    clock.set(200)
    async with reading(server.stream_url, expired=at(0)) as stream:
        wanted = truth(database, 0, 200)
        assert await until_expired(stream, len(wanted)) == wanted
    for event in wanted:
        seen.setdefault(event["seq"], event)
    assert all(event in database.stored() for event in seen.values())


async def test_what_expires_beyond_the_horizon_is_told_when_it_does(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    later = [HORIZON_SECONDS - 1, HORIZON_SECONDS + 1, 5 * HORIZON_SECONDS]
    for seconds in later:
        database.insert(1, exp=at(seconds), val=f"after {seconds}")
    await until_head(server, 3)
    async with live(server) as stream:
        await until(lambda: scheduled(server) == 1)
        for seconds in later:
            database.insert(1, exp=at(seconds), val=f"new, after {seconds}")
        await until(lambda: scheduled(server) == 2)
        for count, seconds in enumerate(later, 1):
            clock.set(seconds)
            await until_expired(stream, 2 * count)
        assert expired(stream) == truth(database, 0, later[-1])


async def test_when_more_expires_than_the_schedule_holds_all_of_it_is_told(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.app.expiry, "_max_labels", 8)
    clock = Clock(server)
    write(database, random.Random(3), 40, 1, 3000)
    await until_head(server, 40)
    async with live(server) as stream:
        write(database, random.Random(4), 40, 1, 3000)
        await stream.until_seq(80)
        await until(lambda: 0 < scheduled(server) <= 8)
        for now in (1, 1000, 3000):
            clock.set(now)
            await until_expired(stream, len(truth(database, 0, now)))
            assert scheduled(server) <= 8
        assert expired(stream) == truth(database, 0, 3000)


async def test_a_clock_that_is_set_back_loses_nothing(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    clock.set(1000)
    async with live(server) as stream:
        database.insert(1, exp=at(1500))
        await until_head(server, 1)
        clock.set(2000)
        await until_expired(stream, 1)
        clock.set(0)
        await until(lambda: server.app.expiry.reported.at == NOON)
        database.insert(1, exp=at(500), val="rude")
        await until_head(server, 2)
        clock.set(500)
        assert (await until_expired(stream, 2))[1:] == database.stored(1)
        # At its own time, again: at least once.
        clock.set(1500)
        assert (await until_expired(stream, 3))[2:] == database.stored()[:1]


async def test_a_database_that_is_away_makes_it_late_and_loses_nothing(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    database.insert(2, exp=at(5))
    await until_head(server, 2)
    async with live(server) as stream:
        await until(lambda: scheduled(server) == 2)
        with away(database):
            await until(lambda: not server.app.feed.sequencer.following)
            clock.set(6)
            await until(lambda: server.app.expiry._checks)
            # Asks while it is away, too.
            async with reading(server.stream_url, expired=at(0)) as other:
                await other.until_opened()
        assert await until_expired(stream, 2) == database.stored()
        clock.set(HORIZON_SECONDS)
        [last] = database.insert(1, exp=at(HORIZON_SECONDS + 10), val="rude")
        await until_head(server, last)
        database.terminate(database.backends())
        clock.set(HORIZON_SECONDS + 10)
        assert await until_expired(stream, 3) == database.stored()


async def test_a_replay_waits_for_the_database_and_live_labels_go_on(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(server)
    clock.set(10)
    database.insert(2, exp=at(5))
    await until_head(server, 2)
    gate = Gate()
    store = server.app.feed.store
    async with live(server):
        await until(lambda: server.app.expiry._schedule.end.at > NOON + 10)
        monkeypatch.setattr(store, "expiring", gate.before(store.expiring))
        async with live(server, expired=at(0)) as stream:
            await gate.reached.wait()
            [last] = database.insert(1)
            await stream.until_seq(last)
            assert expired(stream) == []
            gate.opened.set()
            assert await until_expired(stream, 1) == [database.stored()[1]]


async def test_the_socket_is_told_the_same(server: Server, database: TestDatabase) -> None:
    clock = Clock(server)
    url = f"{server.url}/xrpc/com.atproto.label.subscribeLabels?cursor=0&expired={at(-1)}"
    database.insert(1, exp=at(0), sig=SIG, cid="bafyreib2rxk3rh6kzwq")
    await until_head(server, 1)
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        assert xrpc.decode(await socket.receive_bytes(timeout=PATIENCE_SECONDS)).type == "#labels"
        first = xrpc.decode(await socket.receive_bytes(timeout=PATIENCE_SECONDS))
        [seq] = database.insert(1, exp=at(5), val="rude")
        label = xrpc.decode(await socket.receive_bytes(timeout=PATIENCE_SECONDS))
        clock.set(5)
        second = xrpc.decode(await socket.receive_bytes(timeout=PATIENCE_SECONDS))
    assert (first.type, second.type) == ("#info", "#info")
    assert first.body["label"].pop("sig") == SIG
    stored = database.stored()
    del stored[0]["labels"][0]["sig"]
    assert first.body["label"] == stored[0]["labels"][0]
    assert second.body == {
        "name": "LabelExpired",
        "message": f"the label of seq {seq} has expired",
        "seq": seq,
        "label": label.body["labels"][0],
    }
    assert second.body["label"] == stored[1]["labels"][0]


async def test_a_notice_is_encoded_once_for_all_who_are_told(
    server: Server, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = notice.encode_info

    def counted(name: str, message: str, **more: Any) -> bytes:
        encoded.append(more["seq"])
        return encode(name, message, **more)

    monkeypatch.setattr(notice, "encode_info", counted)
    clock = Clock(server)
    async with live(server) as one, live(server) as two, live(server, values="spam") as three:
        database.insert(3, exp=at(5))
        await until_head(server, 3)
        clock.set(5)
        for each in (one, two, three):
            assert await until_expired(each, 3) == database.stored()
    assert encoded == [1, 2, 3]


async def test_what_is_withheld_is_not_told(run_server: RunServer, database: TestDatabase) -> None:
    async with run_server(unsigned="withhold") as server:
        clock = Clock(server)
        async with live(server) as stream:
            database.insert(1, exp=at(1), val="rude")
            database.insert(1, exp=at(2), sig=SIG)
            await until_head(server, 2)
            clock.set(2)
            assert await until_expired(stream, 1) == database.stored(1)


async def test_ozones_table_is_enough_and_a_label_that_moves_is_told_at_its_new_time(
    run_server: RunServer, empty_database: TestDatabase
) -> None:
    database = empty_database
    database.execute(OZONE_TABLES)
    for number in range(4):
        database.insert(1, uri=f"at://a/{number}", neg=False, exp=at(-1 + number, "+03:00"))
    with role(database, "SELECT ON label") as dsn:
        async with run_server(dsn) as server:
            assert server.app.schema.attached
            clock = Clock(server)
            async with live(server, expired=at(-3600)) as stream:
                assert await until_expired(stream, 2) == database.stored()[:2]
                database.execute(
                    "UPDATE label SET id = nextval('label_id_seq'), exp = %s WHERE id = 3",
                    (at(10),),
                )
                database.execute(
                    "UPDATE label SET id = nextval('label_id_seq'), neg = true WHERE id = 4"
                )
                await until_head(server, 6)
                clock.set(10)
                assert (await until_expired(stream, 3))[2:] == database.stored(4)[:1]


async def test_a_slow_consumer_that_expiries_wait_for_is_cut(
    run_server: RunServer, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_server(outbox_max_events=5) as server:
        clock = Clock(server)
        database.insert(6, exp=at(5))
        await until_head(server, 6)
        async with live(server) as stream:
            await until(lambda: scheduled(server) == 6)
            clock.set(5)
            # All six in one step, in which no consumer has its turn.
            await stream.until_closed()
        [(kind, news)] = stream.news
        assert (kind, news["error"]) == ("error", "ConsumerTooSlow")
        assert server.app.metrics.count["queue_overflows"] == 1
        async with reading(server.stream_url, expired=at(0)) as stream:
            # From the table it comes at its own pace.
            assert await until_expired(stream, 6) == database.stored()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("yes", "expected 'live' or a datetime"),
        ("", "expected 'live' or a datetime"),
        ("2026-06-01", "expected 'live' or a datetime"),
        ("2026-06-01T12:00:00 02:00", "%2B"),
        ("2026-06-01T12:01:00Z", "a time in the past"),
    ],
)
async def test_anything_else_is_refused_by_name(server: Server, value: str, expected: str) -> None:
    Clock(server)
    for place in ("/stream", "/xrpc/com.atproto.label.subscribeLabels"):
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{server.url}{place}", params={"expired": value}) as answer,
        ):
            said = await answer.json()
            assert (answer.status, said["error"]) == (400, "InvalidRequest")
            assert said["message"].startswith(f"expired: got {value!r}, ")
            assert expected in said["message"]


async def test_a_clients_clock_may_be_a_little_ahead(
    server: Server, database: TestDatabase
) -> None:
    clock = Clock(server)
    database.insert(1, exp=at(1))
    await until_head(server, 1)
    async with live(server, expired=at(9)) as stream:
        clock.set(1)
        assert await until_expired(stream, 1) == database.stored()


async def test_what_expires_is_found_by_its_index(database: TestDatabase) -> None:
    database.fill(20_000)
    database.execute(
        "INSERT INTO label (src, uri, cid, val, cts, exp) SELECT src, uri, cid, val, cts,"
        " '2026-06-' || lpad((1 + id %% 28)::text, 2, '0') || 'T00:00:00Z' FROM label"
        " WHERE id %% 10 = 0 AND %s",
        (True,),
    )
    database.execute("ANALYZE label")
    parameters = {"date": "2026-06-10", "seq": 0, "last_date": "2026-06-12", "limit": 5000}
    plan = database.execute(f"EXPLAIN {block('expiring')}", parameters)
    assert "label_expiry_idx" in str(plan)
    assert "Seq Scan" not in str(plan)
    plan = database.execute(
        f"EXPLAIN {block('still_in_force')}",
        {"seqs": list(range(500)), "until": 30_000, "keys_are_unique": False, "unsigned": True},
    )
    assert "label_key_idx" in str(plan)
    assert "Seq Scan" not in str(plan)
