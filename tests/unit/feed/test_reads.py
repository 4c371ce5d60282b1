"""Reads by turns: who shares one, whose turn it is, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sse_labels.feed.reads import IDLE_SECONDS, Reads

from support.virtual_time import virtual_time


class Table:
    """What is read: each read takes a second, or as long as its gate is closed."""

    def __init__(self, most: int) -> None:
        self.reads = Reads(most)
        self.begun: list[Any] = []
        self.under_way: Counter[str] = Counter()
        #: The most of one client's, and of all, that were under way at once.
        self.most: Counter[str] = Counter()
        self.seconds = 1.0
        self.failing: set[Any] = set()
        self.ended: list[Any] = []

    async def ask(self, client: str, key: Any) -> Any:
        async def work() -> Any:
            self.begun.append(key)
            for who in (client, "all"):
                self.under_way[who] += 1
                self.most[who] = max(self.most[who], self.under_way[who])
            try:
                await asyncio.sleep(self.seconds)
                self.ended.append(key)
            finally:
                self.under_way[client] -= 1
                self.under_way["all"] -= 1
            if key in self.failing:
                raise ZeroDivisionError(key)
            return [key]

        return await self.reads.read(client, key, work)

    def asking(self, client: str, *keys: Any) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(self.ask(client, key)) for key in keys]


@asynccontextmanager
async def nothing_left(table: Table) -> AsyncIterator[None]:
    """After the block nobody is stranded, and nothing is kept of anybody but who asked lately."""
    yield
    reads = table.reads
    assert not reads._reads
    assert not any(client.waiting or client.running for client in reads._clients.values())
    await asyncio.sleep(IDLE_SECONDS)
    assert reads.is_alone("nobody yet")
    assert not reads._clients
    assert not reads._idle


@virtual_time
async def test_who_asks_for_the_same_shares_one_read() -> None:
    table = Table(1)
    async with nothing_left(table):
        found = await asyncio.gather(*table.asking("a", 1, 1), *table.asking("b", 1, 2, 1))
    assert table.begun == [1, 2]
    assert found == [[1], [1], [1], [2], [1]]
    assert found[0] is found[1] is found[2] is found[4]


@virtual_time
async def test_who_asks_while_it_is_read_shares_it_and_who_asks_later_does_not() -> None:
    table = Table(2)
    async with nothing_left(table):
        first = table.asking("a", 1)
        await asyncio.sleep(0.5)
        second = table.asking("b", 1)
        await asyncio.gather(*first, *second)
        await table.ask("b", 1)
    assert table.begun == [1, 1]


@virtual_time
async def test_a_client_that_is_alone_has_all_and_no_more() -> None:
    table = Table(3)
    async with nothing_left(table):
        await asyncio.gather(*table.asking("a", *range(9)))
    assert (table.most["a"], table.most["all"]) == (3, 3)


@virtual_time
async def test_beside_others_each_client_has_one_at_a_time() -> None:
    table = Table(3)
    async with nothing_left(table):
        table.asking("many", *range(50))
        await asyncio.sleep(0.5)
        began = asyncio.get_running_loop().time()
        for key in "wxyz":
            await table.ask("one", key)
            table.most.clear()
            table.most.update(table.under_way)
        # It waited for one of those that were under way when it came, and then for none.
        assert asyncio.get_running_loop().time() - began == pytest.approx(4.5)
        assert table.most["many"] == 1
        # Alone again.
        await asyncio.sleep(IDLE_SECONDS + 1)
        assert table.under_way["many"] == 3
        await asyncio.sleep(50)


@virtual_time
async def test_turns_go_among_clients_and_not_by_arrival() -> None:
    table = Table(1)
    async with nothing_left(table):
        asked = table.asking("many", *(f"many {number}" for number in range(900)))
        await asyncio.sleep(0)
        for client in ("one", "two"):
            asked += table.asking(client, *(f"{client} {number}" for number in range(3)))
        await asyncio.gather(*asked)
    for turn in range(3):
        round_ = table.begun[1 + 3 * turn : 4 + 3 * turn]
        assert sorted(key.split()[0] for key in round_) == ["many", "one", "two"]


@virtual_time
async def test_the_time_that_reads_take_is_shared_and_not_their_number() -> None:
    table = Table(1)
    used: Counter[str] = Counter()

    async def ask_on(client: str, seconds: float) -> None:
        async def work() -> None:
            await asyncio.sleep(seconds)
            used[client] += 1

        while True:
            await table.reads.read(client, object(), work)

    asking = [
        asyncio.create_task(ask_on(client, seconds))
        for client, seconds in (("slow", 1.0), ("quick", 0.1))
        for _ in range(2)
    ]
    await asyncio.sleep(100)
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    await table.reads.close()
    assert used["quick"] == pytest.approx(10 * used["slow"], abs=15)


@virtual_time
async def test_who_did_not_ask_has_saved_nothing_up() -> None:
    table = Table(1)
    async with nothing_left(table):
        asked = table.asking("busy", *(f"busy {number}" for number in range(40)))
        table.asking("seldom", "seldom first")
        await asyncio.sleep(20.5)
        asked += table.asking("seldom", *(f"seldom {number}" for number in range(10)))
        begun = len(table.begun)
        await asyncio.gather(*asked)
    turns = [key.split()[0] for key in table.begun[begun : begun + 20]]
    assert 9 <= turns.count("busy") <= 11


@virtual_time
async def test_a_shared_read_has_the_earliest_turn_of_all_who_ask() -> None:
    table = Table(1)
    async with nothing_left(table):
        asked = table.asking("many", *range(10), "shared")
        await asyncio.sleep(0)
        await asyncio.gather(*table.asking("one", "shared"))
        assert table.begun[:2] == [0, "shared"]
        await asyncio.gather(*asked)
    assert Counter(table.begun) == Counter([*range(10), "shared"])


@virtual_time
async def test_who_leaves_does_not_end_a_read_that_has_begun() -> None:
    table = Table(1)
    async with nothing_left(table):
        [only] = table.asking("a", 1)
        await asyncio.sleep(0.5)
        only.cancel()
        await asyncio.wait([only])
        assert only.cancelled()
        # It is nobody's, and whoever asks now gets it.
        assert await table.ask("b", 1) == [1]
    assert table.ended == table.begun == [1]


@virtual_time
async def test_what_nobody_waits_for_any_more_does_not_begin() -> None:
    table = Table(1)
    async with nothing_left(table):
        kept = table.asking("a", 1)
        gone = [*table.asking("a", 2), *table.asking("b", 2, 3)]
        await asyncio.sleep(0.5)
        gone[0].cancel()
        await asyncio.sleep(0.1)
        # One of the two who wait for it is still there.
        assert 2 in table.reads._reads
        gone[1].cancel()
        gone[2].cancel()
        await asyncio.gather(*kept)
        await asyncio.wait(gone)
    assert table.begun == [1]


@virtual_time
async def test_an_error_reaches_all_who_ask_and_the_next_reads_begin() -> None:
    table = Table(1)
    table.failing = {1}
    async with nothing_left(table):
        failing = [*table.asking("a", 1, 1), *table.asking("b", 1)]
        following = [*table.asking("a", 2), *table.asking("b", 3)]
        found = await asyncio.gather(*failing, return_exceptions=True)
        assert all(isinstance(error, ZeroDivisionError) for error in found)
        assert await asyncio.gather(*following) == [[2], [3]]


@virtual_time
async def test_an_error_that_nobody_waits_for_is_no_warning() -> None:
    table = Table(1)
    table.failing = {1}
    async with nothing_left(table):
        [only] = table.asking("a", 1)
        await asyncio.sleep(0.5)
        only.cancel()
        await asyncio.sleep(1)
    assert table.ended == [1]


@virtual_time
async def test_what_is_asked_again_before_all_have_their_answer_is_read_again() -> None:
    table = Table(1)

    async def twice() -> None:
        await table.ask("a", 1)
        assert await table.ask("a", 1) == [1]

    async with nothing_left(table):
        await asyncio.gather(*(asyncio.create_task(twice()) for _ in range(3)))
    assert table.begun == [1, 1]


@virtual_time
async def test_closed_it_ends_what_is_under_way_and_what_waits() -> None:
    table = Table(1)
    async with nothing_left(table):
        asked = [*table.asking("a", 1, 2), *table.asking("b", 2, 3)]
        await asyncio.sleep(0.5)
        await table.reads.close()
        await asyncio.wait(asked)
        assert all(task.cancelled() for task in asked)
    assert (table.begun, table.ended) == ([1], [])


@virtual_time
async def test_in_any_order_everybody_who_stays_is_answered() -> None:
    chance = random.Random(5)
    for _ in range(100):
        table = Table(chance.choice([1, 2, 4]))
        table.failing = {7}

        async def one(table: Table) -> None:
            await asyncio.sleep(chance.random() * 5)
            client, key = chance.choice("abc"), chance.randrange(10)
            try:
                async with asyncio.timeout(chance.choice([0.5, 3, None])):
                    assert await table.ask(client, key) == [key]
            except TimeoutError:
                return
            except ZeroDivisionError:
                assert key == 7

        async with nothing_left(table):
            async with asyncio.TaskGroup() as tasks:
                for _ in range(40):
                    tasks.create_task(one(table))
            await asyncio.sleep(1)
        assert table.most["all"] <= table.reads._max_reads
