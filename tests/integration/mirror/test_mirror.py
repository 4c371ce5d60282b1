"""A mirror: what an upstream has is stored here once, whatever it and the database do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import libipld
import psycopg2
import pytest
from aiohttp import web

from sse_labels.database.connection import Connection
from sse_labels.database.migrations import migrate
from sse_labels.database.pool import Database
from sse_labels.mirror import following
from sse_labels.mirror.storing import UpstreamStore
from sse_labels.protocol.label import label_json, parse_label
from sse_labels.protocol.signatures import SigningKey
from sse_labels.publishing.keys import source_keys_in

from support.database import TestDatabase, insert_with, role, until
from support.labeler import (
    SRC,
    Labeler,
    error_message,
    info_message,
    labeler,
    labels_message,
    message,
    mirroring,
    wire_label,
)
from support.program import free_port
from support.server import PUBLISH_TOKEN, RunServer

OTHER = "did:plc:" + "t" * 24
SIG = bytes(range(64))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RETRY_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(following, "LOCKED_SECONDS", 0.02)


@pytest.fixture
async def upstream() -> AsyncIterator[Labeler]:
    async with labeler() as made:
        yield made


def stored(database: TestDatabase) -> list[dict[str, Any]]:
    """All labels of the table, in the form in which an upstream sends them."""
    labels = [event["labels"][0] for event in database.stored()]
    return [
        {**label, "sig": bytes(SIG)} if label.get("sig") == as_json(SIG) else label
        for label in labels
    ]


def as_json(sig: bytes) -> Any:
    return label_json("", "", "", "", None, "", None, sig)["sig"]


def sent(upstream: Labeler) -> list[dict[str, Any]]:
    return [label for seq in sorted(upstream.labels) for label in upstream.labels[seq]]


def cursor_of(database: TestDatabase) -> int:
    [(cursor,)] = database.execute("SELECT cursor FROM label_upstream")
    return int(cursor)


def set_aside(database: TestDatabase) -> list[tuple[int, int, str, Any]]:
    rows = database.execute(
        "SELECT seq, place, reason, label FROM label_set_aside ORDER BY seq, place"
    )
    return [(*row[:3], libipld.decode_dag_cbor(bytes(row[3]))) for row in rows]


async def test_history_and_live_labels_are_stored_as_they_came(
    upstream: Labeler, database: TestDatabase
) -> None:
    cid = "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a"
    upstream.add(wire_label(1), wire_label(2, cid=cid, neg=True, exp="2030-01-01T00:00:00+02:00"))
    upstream.add(wire_label(3, sig=SIG, neg=False))
    upstream.add(wire_label(4, sig=SIG))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 3)
        upstream.add(wire_label(5, val="ü\U0001f98b"))
        await until(lambda: mirror.cursor == 4)
    # What a signature covers is as it was stated, and what it does not is absent.
    assert stored(database) == sent(upstream)
    assert cursor_of(database) == 4


async def test_the_next_run_goes_on_where_the_last_one_ended(
    upstream: Labeler, database: TestDatabase
) -> None:
    for number in range(3):
        upstream.add(wire_label(number))
        async with mirroring(database, upstream.url, first_cursor=0) as mirror:
            await until(lambda number=number, mirror=mirror: mirror.cursor == number + 1)
    assert upstream.cursors == [0, 1, 2]
    assert stored(database) == sent(upstream)


async def test_an_upstream_that_was_never_followed_begins_where_it_is_told(
    upstream: Labeler, database: TestDatabase
) -> None:
    for number in range(3):
        upstream.add(wire_label(number))
    async with mirroring(database, upstream.url, first_cursor=2) as mirror:
        await until(lambda: mirror.tally["stored"] == 1)
    assert stored(database) == sent(upstream)[2:]


class Dying:
    """Sessions that die right before or after they stored labels, the first few times."""

    def __init__(self, database: TestDatabase, *, after: bool, times: int) -> None:
        self._database = Database(
            database.dsn, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=1
        )
        self._after = after
        self.left = times

    async def __call__(self) -> Connection:
        connection = await self._database.connect()
        fetch = connection.fetch

        async def dying(name: str, **parameters: Any) -> Any:
            if name != "store_mirrored" or not self.left:
                return await fetch(name, **parameters)
            self.left -= 1
            if self._after:
                await fetch(name, **parameters)
            connection.close()
            # What a closed connection says to whoever waits for its answer.
            return await fetch(name, **parameters)

        connection.fetch = dying  # type: ignore[method-assign]
        return connection


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_session_that_dies_around_the_commit_loses_and_doubles_nothing(
    upstream: Labeler, database: TestDatabase, after: bool
) -> None:
    dying = Dying(database, after=after, times=3)
    async with mirroring(database, upstream.url, connect=dying) as mirror:
        for number in range(8):
            upstream.add(wire_label(number))
            await until(lambda number=number: mirror.cursor == number + 1)
    assert dying.left == 0
    assert stored(database) == sent(upstream)


async def test_backends_that_are_terminated_lose_and_double_nothing(
    upstream: Labeler, database: TestDatabase
) -> None:
    async with mirroring(database, upstream.url) as mirror:
        for number in range(6):
            upstream.add(wire_label(number))
            if number % 2:
                database.terminate(database.backends("label_upstream|store_mirrored|moved"))
            await until(lambda number=number: mirror.cursor == number + 1)
        assert mirror.tally["reconnects"] >= 1
    assert stored(database) == sent(upstream)


async def test_of_two_mirrors_one_waits_and_takes_over(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    upstream.add(wire_label(1))
    first = mirroring(database, upstream.url)
    one = await first.__aenter__()
    await until(lambda: one.cursor == 1)
    async with mirroring(database, upstream.url) as two:
        await until(lambda: any("another process follows" in line for line in caplog.messages))
        upstream.add(wire_label(2))
        await until(lambda: one.cursor == 2)
        assert two.cursor == 0
        await first.__aexit__(None, None, None)
        upstream.add(wire_label(3))
        await until(lambda: two.cursor == 3)
    assert stored(database) == sent(upstream)


async def test_a_cursor_that_somebody_else_moved_stores_nothing(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.add(wire_label(1))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
        database.execute("UPDATE label_upstream SET cursor = 2")
        upstream.add(wire_label(2))
        upstream.add(wire_label(3))
        await until(lambda: mirror.cursor == 3)
    assert stored(database) == [sent(upstream)[0], sent(upstream)[2]]
    assert any("somebody else moved the cursor" in line for line in caplog.messages)


async def test_several_upstreams_are_followed_at_once(
    upstream: Labeler, database: TestDatabase
) -> None:
    async with (
        labeler() as second,
        mirroring(database, upstream.url) as one,
        mirroring(database, second.url) as two,
    ):
        for number in range(5):
            upstream.add(wire_label(number))
            second.add(wire_label(number, src=OTHER))
        await until(lambda: one.cursor == two.cursor == 5)
    for each, src in ((upstream, SRC), (second, OTHER)):
        assert [label for label in stored(database) if label["src"] == src] == sent(each)


async def test_an_upstream_that_began_anew_is_read_from_its_beginning_and_doubles_nothing(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        upstream.add(wire_label(number))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 5)
    # Restored from a backup: the last two are gone, and others took their place.
    before = sent(upstream)
    del upstream.labels[4], upstream.labels[5]
    upstream.add(wire_label(10))
    upstream.cursors.clear()
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 4)
        upstream.add(wire_label(11))
        await until(lambda: mirror.cursor == 5)
    assert upstream.cursors == [5, 5, 5, 0]
    assert stored(database) == [*before, wire_label(10), wire_label(11)]
    assert any("began anew" in line and "cursor=5" in line for line in caplog.text.splitlines())


async def test_a_server_that_is_a_moment_behind_is_not_taken_for_one_that_began_anew(
    upstream: Labeler, database: TestDatabase
) -> None:
    for number in range(3):
        upstream.add(wire_label(number))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 3)
    denials = 2

    async def behind(socket: web.WebSocketResponse, cursor: int) -> bool:
        nonlocal denials
        denials -= 1
        if denials >= 0:
            await socket.send_bytes(error_message("FutureCursor"))
            await socket.close(code=1008)
        return denials >= 0

    upstream.say = behind
    async with mirroring(database, upstream.url) as mirror:
        upstream.add(wire_label(3))
        await until(lambda: mirror.cursor == 4)
        assert mirror.tally["rewinds"] == 0
    assert upstream.cursors == [0, 3, 3, 3]
    assert stored(database) == sent(upstream)


async def test_a_server_of_ours_as_upstream_is_followed_through_a_new_epoch(
    run_server: RunServer, database: TestDatabase, empty_database: TestDatabase
) -> None:
    edge = Database(
        empty_database.dsn, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=1
    )
    await migrate(edge)
    edge.close()
    port = free_port()
    url = f"ws://127.0.0.1:{port}/xrpc/com.atproto.label.subscribeLabels"
    async with mirroring(empty_database, url) as mirror:
        database.insert(3, sig=SIG)
        async with run_server(port=port):
            await until(lambda: mirror.cursor == 3)
        # As after a restore: another epoch, and more labels than were ever mirrored.
        database.execute("UPDATE label_stream SET epoch = gen_random_uuid()")
        database.insert(2, val="rude", sig=SIG)
        async with run_server(port=port):
            await until(lambda: mirror.cursor == 5)
        assert mirror.tally["rewinds"] == 1
        assert (mirror.tally["stored"], mirror.tally["known"]) == (5, 3)
    assert stored(empty_database) == stored(database)


async def test_a_database_is_not_mirrored_into_itself(
    run_server: RunServer, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    database.insert(1)
    async with run_server() as server:
        url = f"{server.url.replace('http', 'ws')}/xrpc/com.atproto.label.subscribeLabels"
        async with mirroring(database, url) as mirror:
            await until(lambda: mirror.tally["reconnects"] >= 2)
    assert len(database.stored()) == 1
    assert "it streams this very database" in caplog.text


async def test_what_nobody_expected_ends_no_mirror(
    upstream: Labeler, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    place = UpstreamStore.place

    async def failing(self: UpstreamStore, first: int = 0) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("nobody expected this")
        return await place(self, first)

    monkeypatch.setattr(UpstreamStore, "place", failing)
    upstream.add(wire_label(1))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
    assert stored(database) == sent(upstream)


async def test_an_outdated_cursor_is_told_and_the_rest_is_stored(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def outdated(socket: web.WebSocketResponse, cursor: int) -> bool:
        await socket.send_bytes(info_message("OutdatedCursor"))
        await socket.send_bytes(info_message("WeatherReport"))
        return False

    upstream.say = outdated
    upstream.add(wire_label(1))
    caplog.set_level("INFO")
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
        assert mirror.tally["outdated"] == 1
    assert stored(database) == sent(upstream)
    assert any("has deleted labels after the cursor" in line for line in caplog.messages)
    assert "kind=WeatherReport" in caplog.text


async def test_a_negation_that_the_upstream_forgot_is_taken_back_here_too(
    upstream: Labeler, database: TestDatabase
) -> None:
    given, taken_back = wire_label(1), wire_label(1, neg=True, cts="2026-01-02T00:00:00.000Z")
    upstream.add(given)
    upstream.add(taken_back)
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 2)
    # Restored from a backup of before the negation.
    upstream.labels = {1: [given]}
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: (mirror.tally["rewinds"], mirror.cursor) == (1, 1))
        assert stored(database) == [given, taken_back, given]
        # In one message, too, each is held against the one before it.
        upstream.add(taken_back, given, given, taken_back)
        await until(lambda: mirror.cursor == 2)
    assert stored(database)[3:] == [taken_back, given, taken_back]


async def test_another_source_of_an_upstream_begins_at_its_beginning_and_doubles_nothing(
    upstream: Labeler, database: TestDatabase
) -> None:
    for number in range(3):
        upstream.add(wire_label(number), wire_label(number, src=OTHER))
    async with mirroring(database, upstream.url, did=SRC) as mirror:
        await until(lambda: mirror.cursor == 3)
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 3)
    for src in (SRC, OTHER):
        wanted = [label for label in sent(upstream) if label["src"] == src]
        assert [label for label in stored(database) if label["src"] == src] == wanted


async def test_an_epoch_that_is_none_is_not_kept(upstream: Labeler, database: TestDatabase) -> None:
    upstream.headers = {"Sse-Labels-Epoch": "\u00ff\u00fe"}
    upstream.add(wire_label(1))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
    assert database.execute("SELECT epoch FROM label_upstream") == [(None,)]


async def test_no_wish_of_an_upstream_is_followed_for_ever(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    upstream.refusal = web.Response(status=503, headers={"Retry-After": "9" * 400})
    async with mirroring(database, upstream.url):
        await until(lambda: any("no upstream" in line for line in caplog.messages))
    [line] = [line for line in caplog.text.splitlines() if "no upstream" in line]
    assert 3600 <= float(line.partition("next_try_seconds=")[2]) < 3601


GARBAGE = {
    "no message": b"garbage",
    "one object": libipld.encode_dag_cbor({"op": 1, "t": "#labels"}),
    "no labels": message({"op": 1, "t": "#labels"}, {"seq": 1}),
    "no seq": message({"op": 1, "t": "#labels"}, {"labels": []}),
    "a seq below": message({"op": 1, "t": "#labels"}, {"seq": 0, "labels": []}),
    "a seq that is true": message({"op": 1, "t": "#labels"}, {"seq": True, "labels": []}),
    "too many labels": labels_message(1, *[0] * 10_001),
    "too large": b"x" * ((1 << 20) + 1),
    "slow": error_message("ConsumerTooSlow"),
    "text": "text",
    "nothing": None,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_what_is_no_message_ends_the_connection_and_moves_nothing(
    upstream: Labeler,
    database: TestDatabase,
    garbage: bytes | str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoke = False

    async def babble(socket: web.WebSocketResponse, cursor: int) -> bool:
        nonlocal spoke
        if spoke:
            return False
        spoke = True
        if isinstance(garbage, str):
            await socket.send_str(garbage)
        elif garbage is not None:
            await socket.send_bytes(garbage)
        return True

    upstream.say = babble
    upstream.add(wire_label(1))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
        assert mirror.tally["reconnects"] == 1
    assert upstream.cursors == [0, 0]
    assert stored(database) == sent(upstream)
    [line] = [line for line in caplog.text.splitlines() if "no upstream" in line]
    assert "cursor=0 error=it " in line or "Message size" in line
    assert len(line) < 500


async def test_seqs_that_go_back_end_the_connection(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def jump(socket: web.WebSocketResponse, cursor: int) -> bool:
        if cursor:
            return False
        await socket.send_bytes(labels_message(50, wire_label(50)))
        await socket.send_bytes(labels_message(1, wire_label(1)))
        return True

    upstream.say = jump
    for number in range(60):
        upstream.add(wire_label(number + 1))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 60)
    assert "its seqs went back: 1 came after 50" in caplog.text
    assert stored(database) == [wire_label(number) for number in range(50, 61)]


async def test_unknown_messages_and_seqs_that_come_again_change_nothing(
    upstream: Labeler, database: TestDatabase
) -> None:
    async def chatter(socket: web.WebSocketResponse, cursor: int) -> bool:
        await socket.send_bytes(message({"op": 1, "t": "#weather"}, {"rain": 1}))
        await socket.send_bytes(labels_message(1, wire_label(1)))
        await socket.send_bytes(labels_message(1, wire_label(1)))
        return False

    upstream.say = chatter
    upstream.add(wire_label(1))
    upstream.add(wire_label(2))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 2)
        assert mirror.tally["repeated"] >= 1
    assert stored(database) == sent(upstream)


async def test_labels_that_break_the_lexicon_are_set_aside_whole(
    upstream: Labeler, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        wire_label(1, cts="yesterday"),
        wire_label(2, reason="an unknown field, which a signature may cover", sig=SIG),
        wire_label(3, val="a\0b"),
        "no label",
    ]
    upstream.add(wire_label(0), *bad)
    upstream.add(wire_label(4))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 2)
        assert mirror.tally["set_aside"] == 4
    assert stored(database) == [wire_label(0), wire_label(4)]
    aside = set_aside(database)
    assert [(seq, place, label) for seq, place, _, label in aside] == [
        (1, place, label) for place, label in enumerate(bad, start=1)
    ]
    assert [reason.split(":")[0] for _, _, reason, _ in aside] == [
        "cts", "reason", "val", "got 'no label', expected a JSON object",
    ]  # fmt: skip
    assert sum("a label is set aside" in line for line in caplog.messages) == 4


async def test_fields_that_the_lexicon_does_not_know_are_ignored(
    upstream: Labeler, database: TestDatabase
) -> None:
    odd: dict[str, Any] = {"$type": "com.atproto.label.defs#label", "reason": {"sig": [SIG]}}
    upstream.labels[1] = [wire_label(1, **odd), wire_label(2, Neg=True, neg=False)]
    header, body = {"op": 1, "t": "#labels", "v": 2}, {"seq": 2, "labels": [wire_label(3)]}

    async def newer(socket: web.WebSocketResponse, cursor: int) -> bool:
        await socket.send_bytes(labels_message(1, *upstream.labels[1]))
        await socket.send_bytes(message({"op": 2, "more": True}, {"seq": 9, "labels": [1]}))
        await socket.send_bytes(message(header, {**body, "prev": 1, "$type": "x"}))
        await socket.receive()
        return True

    upstream.say = newer
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 2)
        assert mirror.tally["reconnects"] == 0
    assert stored(database) == [wire_label(number) for number in (1, 2, 3)]
    assert set_aside(database) == []


async def test_a_field_that_a_signature_may_cover_is_ignored_only_when_it_does_not(
    upstream: Labeler, database: TestDatabase, tmp_path: Path
) -> None:
    key = SigningKey(b"\x1f" * 32)
    (tmp_path / "keys").write_text(f"{SRC} {key.did_key}\n")
    sig = key.sign(parse_label(wire_label(1))).sig
    upstream.add(wire_label(1, sig=sig, reason="added when it was signed already"))
    # Its signature would be right if the field were dropped; the one of `sig` itself is not known.
    upstream.add(wire_label(1, sig={"$bytes": as_json(sig)["$bytes"], "alg": "k256"}))
    # Without the field it is no signature of this label.
    upstream.add(wire_label(2, sig=sig, reason="covered"))
    async with mirroring(
        database, upstream.url, source_keys=source_keys_in(tmp_path / "keys")
    ) as mirror:
        await until(lambda: mirror.cursor == 3)
    [(uri, kept)] = database.execute("SELECT uri, sig FROM label")
    assert (uri, bytes(kept)) == (wire_label(1)["uri"], sig)
    assert [reason.split(":")[0] for _, _, reason, _ in set_aside(database)] == ["sig", "reason"]


async def test_wrong_signatures_are_set_aside_and_right_ones_kept(
    upstream: Labeler, database: TestDatabase, tmp_path: Path
) -> None:
    key = SigningKey(b"\x1f" * 32)
    (tmp_path / "keys").write_text(f"{SRC} {key.did_key}\n")
    signed = key.sign(parse_label(wire_label(1)))
    upstream.add(wire_label(1, sig=signed.sig))
    upstream.add(wire_label(2, sig=signed.sig))
    upstream.add(wire_label(3, sig=SIG, src=OTHER))
    keys = source_keys_in(tmp_path / "keys")
    async with mirroring(database, upstream.url, source_keys=keys, any_source=True) as mirror:
        await until(lambda: mirror.cursor == 3)
    [row, other] = database.execute("SELECT src, sig FROM label ORDER BY id")
    assert (row[0], bytes(row[1])) == (SRC, signed.sig)
    assert other[0] == OTHER
    [(seq, _, reason, label)] = set_aside(database)
    assert (seq, reason) == (2, f"sig: is not a signature of {SRC} for this label")
    assert label == upstream.labels[2][0]


async def test_labels_of_other_sources_are_left_out_when_one_is_named(
    upstream: Labeler, database: TestDatabase
) -> None:
    upstream.add(wire_label(1), wire_label(2, src=OTHER))
    upstream.add(wire_label(3, src=OTHER))
    async with mirroring(database, upstream.url, did=SRC) as mirror:
        await until(lambda: mirror.cursor == 2)
    assert stored(database) == [wire_label(1)]
    assert set_aside(database) == []


async def test_by_keys_only_labels_with_a_right_signature_are_taken(
    upstream: Labeler, database: TestDatabase, tmp_path: Path
) -> None:
    key = SigningKey(b"\x1f" * 32)
    (tmp_path / "keys").write_text(f"{SRC} {key.did_key}\n")
    signed = wire_label(1, sig=key.sign(parse_label(wire_label(1))).sig)
    upstream.add(signed, wire_label(2), wire_label(3, src=OTHER), wire_label(4, sig=SIG, src=OTHER))
    upstream.add(wire_label(5, sig=SIG))
    keys = source_keys_in(tmp_path / "keys")
    async with mirroring(database, upstream.url, source_keys=keys) as mirror:
        await until(lambda: mirror.cursor == 2)
        assert mirror.tally["stored"] == 1
    [(uri, sig)] = database.execute("SELECT uri, sig FROM label")
    assert (uri, bytes(sig)) == (signed["uri"], signed["sig"])
    # Unsigned, and of sources without a key: ignored. A wrong signature: set aside.
    assert [seq for seq, *_ in set_aside(database)] == [2]


def own(database: TestDatabase) -> set[str]:
    return {src for (src,) in database.execute("SELECT src FROM label_own_source")}


async def test_a_label_that_was_published_here_is_not_negated_by_an_upstream(
    upstream: Labeler,
    run_server: RunServer,
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    upstream.add(wire_label(1, neg=True), wire_label(1, neg=True, src=OTHER))
    async with run_server() as server:
        async with aiohttp.request(
            "POST",
            f"{server.url}/labels",
            headers={"Authorization": f"Bearer {PUBLISH_TOKEN}"},
            json={"labels": [wire_label(1)]},
        ) as answer:
            assert answer.status == 201
        async with mirroring(database, upstream.url) as mirror:
            await until(lambda: mirror.cursor == 1)
            assert (mirror.tally["stored"], mirror.tally["own"]) == (1, 1)
            # It becomes this database's own while it is mirrored, by whoever stores it.
            assert own(database) == {SRC}
            database.insert(1, src=OTHER)
            upstream.add(wire_label(2, src=OTHER))
            upstream.add(wire_label(3, src="did:web:third.example"))
            await until(lambda: mirror.cursor == 3)
            assert (mirror.tally["stored"], mirror.tally["own"]) == (2, 2)
    assert own(database) == {SRC, OTHER}
    assert [(label["src"], label["uri"][-1], "neg" in label) for label in stored(database)] == [
        (SRC, "1", False),
        (OTHER, "1", True),
        (OTHER, "0", False),
        ("did:web:third.example", "3", False),
    ]
    assert any("own sources are left out" in line for line in caplog.messages)


async def test_the_source_that_a_server_signs_for_is_its_databases_own(
    upstream: Labeler, run_server: RunServer, database: TestDatabase, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("1f" * 32)
    async with run_server(signing_key_file=tmp_path / "key", signing_did=SRC):
        pass
    upstream.add(wire_label(1), wire_label(2, src=OTHER))
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 1)
    assert own(database) == {SRC}
    assert stored(database) == [wire_label(2, src=OTHER)]


async def test_a_server_that_may_not_say_what_it_signs_for_says_which_right_it_lacks(
    run_server: RunServer,
    database: TestDatabase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "key").write_text("1f" * 32)
    with role(database, "SELECT ON label, label_stream", "SELECT ON SEQUENCE label_id_seq") as dsn:
        async with run_server(
            dsn=dsn, migrate=False, signing_key_file=tmp_path / "key", signing_did=SRC
        ):
            pass
    assert any("GRANT SELECT, INSERT ON label_own_source" in line for line in caplog.messages)


async def test_two_writers_of_a_new_source_do_not_wait_for_each_other(
    database: TestDatabase,
) -> None:
    first = database.connect().cursor()
    first.execute("BEGIN")
    insert_with(lambda sql, row: first.execute(sql, row) or first.fetchall())
    database.execute("SET lock_timeout = '5s'")
    database.insert(1)
    first.execute("COMMIT")
    [one, two] = database.stored()
    assert own(database) == {one["labels"][0]["src"]} == {two["labels"][0]["src"]}


async def test_who_may_store_labels_needs_no_right_to_have_their_source_noted(
    database: TestDatabase,
) -> None:
    with role(database, "INSERT ON label", "USAGE ON SEQUENCE label_id_seq") as dsn:
        connection = psycopg2.connect(dsn)
        with connection, connection.cursor() as cursor:
            # Nothing of the caller's is taken for the table.
            cursor.execute("CREATE TEMP TABLE label_own_source (src varchar)")
            for src in (SRC, "x" * 10_000):
                cursor.execute(
                    "INSERT INTO label (src, uri, cid, val, cts) VALUES (%s, 'at://x', '', '', '')",
                    (src,),
                )
        connection.close()
    assert own(database) == {SRC}


async def test_an_upstream_that_is_not_there_yet_is_tried_again(
    database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async with mirroring(database, "ws://127.0.0.1:9/xrpc/x") as mirror:
        await until(lambda: mirror.tally["reconnects"] >= 3)
    assert any("no upstream" in line for line in caplog.messages)


async def test_much_history_is_stored_in_few_transactions(
    upstream: Labeler, database: TestDatabase
) -> None:
    for number in range(3000):
        upstream.labels[number + 1] = [wire_label(number)]
    async with mirroring(database, upstream.url) as mirror:
        await until(lambda: mirror.cursor == 3000)
    assert stored(database) == sent(upstream)
    [(transactions,)] = database.execute("SELECT count(DISTINCT xmin::text) FROM label")
    assert transactions < 600
