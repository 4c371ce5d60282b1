"""Attached to the real Ozone: what it stores is streamed, all of it, and nothing is written."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from oracle import tell

from support.database import TestDatabase, role, until
from support.node import PACKAGES
from support.ozone import Ozone, account, ozone, record
from support.program import Program, running
from support.reading import reading

#: Rights enough, and no other.
READ_ONLY = "SELECT ON label"
SLOW_POLL = "--poll-seconds=30"


def attached(dsn: str, *options: str) -> Any:
    return running("serve", "--port=0", "--dsn", dsn, SLOW_POLL, *options)


def url_of(server: Program) -> str:
    return server.wait_for(r"http://127\.0\.0\.1:\d+")[0]


@pytest.mark.parametrize("packages", PACKAGES)
async def test_labels_made_in_ozone_arrive_equal_to_its_table(
    empty_database: TestDatabase, packages: str
) -> None:
    async with ozone(empty_database, packages) as labeler:
        await labeler.label(account("early"), "spam", "rude")
        with (
            role(empty_database, READ_ONLY) as dsn,
            attached(dsn) as server,
        ):
            assert server.wait_for("attached to Ozone")
            async with reading(f"{url_of(server)}/stream", cursor=0) as stream:
                assert await stream.until_seq(2) == empty_database.stored()
                await labeler.label(record("alice", "3jzfcijpj2z2a"), "porn")
                await stream.until_seq(3)
                # Taken back, and given again: Ozone moves the row to a new id each time. Each is
                # waited for: what is moved again before anybody looked is gone.
                await labeler.label(account("early"), negate=("spam",))
                await stream.until_seq(4)
                await labeler.label(account("early"), "spam")
                events = await stream.until_seq(5)
            # The table forgets what it moved; the stream has told it.
            seqs = [event["seq"] for event in events]
            assert seqs == sorted(set(seqs))
            assert events[2]["labels"][0]["val"] == "porn"
            told = {event["seq"]: event for event in events}
            assert all(told[event["seq"]] == event for event in empty_database.stored())
            moved = [event for event in events if event not in empty_database.stored()]
            assert [event["labels"][0].get("neg", False) for event in moved] == [False, True]
            assert all("sig" in event["labels"][0] for event in events)


async def test_a_label_is_heard_of_at_once_not_at_the_next_poll(
    empty_database: TestDatabase,
) -> None:
    async with ozone(empty_database) as labeler:
        with role(empty_database, READ_ONLY) as dsn, attached(dsn) as server:
            async with reading(f"{url_of(server)}/stream", cursor=0) as stream:
                await labeler.label(account("first"), "spam")
                await stream.until_seq(1)
                begun = time.monotonic()
                await labeler.label(account("second"), "spam")
                await stream.until_seq(2)
                assert time.monotonic() - begun < 5


@pytest.mark.parametrize("packages", PACKAGES)
async def test_ozones_own_stream_loses_a_label_and_ours_has_it(
    empty_database: TestDatabase, packages: str, request: pytest.FixtureRequest
) -> None:
    async with ozone(empty_database, packages) as labeler:
        await labeler.label(account("before"), "spam")
        with role(empty_database, READ_ONLY) as dsn, attached(dsn) as server:
            async with (
                reading(f"{url_of(server)}/stream", cursor=0) as ours,
                labeler.subscribed(0) as theirs,
            ):
                await until(lambda: len(theirs) == 1)
                await report_many(labeler, "offender", 160)
                await takedown_among_labels(empty_database, labeler)
                stored = [event["seq"] for event in empty_database.stored()]
                await until(lambda: has_reached(theirs, stored[-1]))
                # Its stream has gone by, and looks once more whenever a label is made.
                await labeler.label(account("after"), "spam")
                await until(lambda: has_reached(theirs, stored[-1] + 1))
                stored.append(stored[-1] + 1)
                lost = sorted(set(stored) - set(seqs_of(theirs)))
                events = await ours.until_seq(stored[-1])
        table = empty_database.stored()
        told = {event["seq"]: event for event in events}
        tell(
            request.config,
            f"table: {[event['seq'] for event in table]}; Ozone's stream: {seqs_of(theirs)}; "
            f"ours: {sorted(told)}; lost by Ozone: {lost}",
        )
        assert all(told[event["seq"]] == event for event in table)
        assert [event["seq"] for event in events] == sorted(told)
        assert set(seqs_of(theirs)) <= set(told)
        assert lost, "Ozone lost nothing: is its sequencer mended?"


def seqs_of(messages: list[Any]) -> list[int]:
    return [message.body["seq"] for message in messages if message.type == "#labels"]


def has_reached(messages: list[Any], seq: int) -> bool:
    return max(seqs_of(messages), default=0) >= seq


async def report_many(labeler: Ozone, name: str, count: int) -> None:
    for number in range(count):
        await labeler.emit(
            record(name, f"3k{number:0>11}"),
            "modEventReport",
            reportType="com.atproto.moderation.defs#reasonSpam",
        )


async def takedown_among_labels(database: TestDatabase, labeler: Ozone) -> None:
    """Take an account down, acknowledging its reports, while other labels are made.

    The takedown's transaction takes its label's id first, and then acknowledges each report. One
    of them is locked here: a moderator who looks at that report at this moment would do the same.
    """
    moderator = database.connect(autocommit=False)
    with moderator.cursor() as cursor:
        cursor.execute(
            'SELECT id FROM moderation_subject_status WHERE did = %s AND "recordPath" <> %s'
            " ORDER BY id DESC LIMIT 1 FOR UPDATE",
            (account("offender")["did"], ""),
        )
        assert cursor.fetchall()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(
            labeler.emit(account("offender"), "modEventTakedown", acknowledgeAccountSubjects=True)
        )
        await until(lambda: database.waiting_for_locks() == 1)
        for number in range(3):
            await labeler.label(account(f"meanwhile{number}"), "spam")
        moderator.rollback()
