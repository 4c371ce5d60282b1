"""The workers of one server, here several views in one process: who accepts, who answers what."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from unittest.mock import Mock

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families

from sse_labels.metrics import COUNTERS, Metrics
from sse_labels.web.health import HealthHandlers
from sse_labels.workers import neighbours
from sse_labels.workers.neighbours import AHEAD, Neighbours, new_words, words_in

RUN = secrets.token_hex(16)


@pytest.fixture
def three() -> Iterator[list[Neighbours]]:
    """Each mapped for itself, as by processes; all accept but the last."""
    descriptor = new_words(3)
    made = [Neighbours(index, words_in(descriptor), RUN) for index in range(3)]
    for each in made[:2]:
        each.hold(0)
    yield made
    os.close(descriptor)


class TestWhoAccepts:
    def test_who_holds_clearly_more_lets_those_accept_that_do(
        self, three: list[Neighbours]
    ) -> None:
        one, other, closed = three
        other.hold(None)
        one.hold(AHEAD + 1)
        # Nobody else accepts yet.
        assert not one.yields(full=False)
        other.hold(0)
        assert one.yields(full=False)
        assert not other.yields(full=False)
        assert not closed.yields(full=False)
        one.hold(AHEAD)
        assert not one.yields(full=False)

    def test_with_many_the_difference_may_be_larger(self, three: list[Neighbours]) -> None:
        one, other, _ = three
        one.hold(1600)
        other.hold(1600 - 100 - AHEAD)
        assert not one.yields(full=False)
        other.hold(1600 - 100 - AHEAD - 1)
        assert one.yields(full=False)

    def test_one_that_is_full_lets_any_accept_that_holds_fewer(
        self, three: list[Neighbours]
    ) -> None:
        one, other, _ = three
        one.hold(1600)
        other.hold(1599)
        assert not one.yields(full=False)
        assert one.yields(full=True)
        other.hold(1600)
        assert not one.yields(full=True)

    def test_nobody_waits_for_one_that_takes_none(self, three: list[Neighbours]) -> None:
        one, stuck, _ = three
        one.hold(50)
        assert one.yields(full=False)
        for held in range(51, 54):
            assert not one.yields(full=True)
            one.hold(held)
        # It was only busy.
        stuck.hold(1)
        assert one.yields(full=False)

    def test_one_that_takes_each_connection_is_let_accept_again(
        self, three: list[Neighbours]
    ) -> None:
        one, other, _ = three
        one.hold(50)
        other.hold(20)
        assert one.yields(full=True)
        # It took the connection, and lost another: it holds as many as before.
        assert not one.yields(full=True)
        one.accepted()
        assert one.yields(full=True)

    def test_one_that_is_stuck_hides_nobody_who_is_behind(self, three: list[Neighbours]) -> None:
        one, _, new = three
        one.hold(50)
        for held in range(20):
            new.hold(held)
            assert one.yields(full=False)
            assert not one.yields(full=False)


@asynccontextmanager
async def answering(
    workers: list[Neighbours], answer: Callable[..., object]
) -> AsyncIterator[None]:
    """Let all but the first answer `what`, inside the block."""
    async with AsyncExitStack() as stack:
        for each in workers:
            each.answers["what"] = lambda *said, each=each: answer(each.number, *said)
        for each in workers[1:]:
            await stack.enter_async_context(each.answering())
        yield


class TestQuestions:
    async def test_all_that_are_asked_answer(self, three: list[Neighbours]) -> None:
        async with answering(three, lambda *said: list(said)):
            answers, silent = await three[0].ask("what", "ä\n", None, 7)
        assert answers == [[1, "ä\n", None, 7], [2, "ä\n", None, 7], [3, "ä\n", None, 7]]
        assert silent == []

    async def test_those_that_are_gone_or_stuck_are_named_and_hold_nobody_up(
        self, three: list[Neighbours], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with answering(three, lambda *said: list(said)):
            pass
        assert await three[0].ask("what") == ([[1]], [2, 3])
        monkeypatch.setattr(neighbours, "ANSWER_SECONDS", 0.05)
        stuck = asyncio.Event()

        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await stuck.wait()
            writer.close()

        server = await asyncio.start_unix_server(never, three[1]._name(1))
        assert await three[0].ask("what") == ([[1]], [2, 3])
        stuck.set()
        server.close()

    async def test_another_user_is_neither_answered_nor_believed(
        self, three: list[Neighbours], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        async with answering(three, lambda *said: asked.append(said) or True):
            # Whoever is at the other end is not whom this process now takes itself for.
            monkeypatch.setattr(neighbours.os, "geteuid", lambda: 12345)
            reader, writer = await asyncio.open_unix_connection(three[1]._name(1))
            writer.write(b'["what"]\n')
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                answer = await reader.read()
            assert answer == b""
            writer.close()
            assert (await three[0].ask("what"))[1] == [2, 3]
        assert [number for number, *_ in asked] == [1]


def samples(text: str) -> dict[str, float]:
    """What Prometheus would store; each family must be one block."""
    helps = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) == len(set(helps))
    return {
        "|".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scraped(health: HealthHandlers) -> dict[str, float]:
    response = await health.metrics(make_mocked_request("GET", "/metrics"))
    return samples(response.body.decode())  # type: ignore[union-attr]


class TestMetrics:
    async def test_any_worker_shows_the_numbers_of_all_that_answer(
        self, three: list[Neighbours]
    ) -> None:
        counted = [Metrics(each.number) for each in three]
        for number, metrics in enumerate(counted, start=1):
            three[number - 1].answers["numbers"] = metrics.numbers
            metrics.events_delivered += 10**number
            metrics.streams_ended["ClientGone"] += number
            metrics.gauges["streams"] = lambda number=number: number
            metrics.fanout_seconds.observe(0.003)
        counted[2].requests_refused['x"\n'] += 1
        health = HealthHandlers(Mock(), Mock(), three[0])
        async with three[1].answering():
            async with three[2].answering():
                shown = await scraped(health)
            without_the_last = await scraped(health)
        for number in (1, 2, 3):
            assert shown[f"sse_labels_events_delivered_total|{number}"] == 10**number
            assert shown[f"sse_labels_streams_ended_total|ClientGone|{number}"] == number
            assert shown[f"sse_labels_streams|{number}"] == number
            assert shown[f"sse_labels_commit_to_fanout_seconds_bucket|0.005|{number}"] == 1
            assert shown[f"process_open_fds|{number}"] > 0
            assert {f"sse_labels_{name}_total|{number}" for name in COUNTERS} <= shown.keys()
        assert shown['sse_labels_requests_refused_total|x"\n|3'] == 1
        # One that is gone takes its own numbers along, and nobody else's change.
        left = {name for name in shown if not name.endswith("|3")}
        assert {name for name in without_the_last if "process" not in name} == {
            name for name in left if "process" not in name
        }
        assert all(
            without_the_last[name] == shown[name] for name in left if "process" not in name
        )  # fmt: skip

    async def test_a_flood_of_scrapes_asks_each_worker_once_at_a_time(self) -> None:
        metrics, asked = Metrics(), []
        reached, go_on = asyncio.Event(), asyncio.Event()

        class Slow(neighbours.neighbours.Neighbours):
            async def ask(self, *question: object) -> tuple[list[object], list[int]]:
                asked.append(question)
                reached.set()
                numbers = metrics.numbers()
                await go_on.wait()
                return [numbers], []

        health = HealthHandlers(Mock(), Mock(), Slow())
        first = asyncio.create_task(scraped(health))
        await reached.wait()
        metrics.count["holes"] += 1
        others = [asyncio.create_task(scraped(health)) for _ in range(100)]
        await asyncio.sleep(0)
        go_on.set()
        # Who came later is told what happened before.
        assert (await first)["sse_labels_holes_total"] == 0
        assert [(await other)["sse_labels_holes_total"] for other in others] == [1] * 100
        assert len(asked) == 2

    async def test_scrapes_whose_clients_leave_are_no_answer_for_those_that_wait(self) -> None:
        metrics = Metrics()
        asked: asyncio.Queue[None] = asyncio.Queue()
        go_on = asyncio.Event()

        class Slow(neighbours.neighbours.Neighbours):
            async def ask(self, *question: object) -> tuple[list[object], list[int]]:
                asked.put_nowait(None)
                await go_on.wait()
                return [metrics.numbers()], []

        health = HealthHandlers(Mock(), Mock(), Slow())
        scrapes = [asyncio.create_task(scraped(health)) for _ in range(3)]
        for leaving in scrapes[:2]:
            await asked.get()
            leaving.cancel()
        go_on.set()
        assert (await scrapes[2])["sse_labels_holes_total"] == 0
