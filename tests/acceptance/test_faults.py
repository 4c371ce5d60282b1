"""Nothing is lost whatever fails: each fault strikes while many read and many write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from oracle import SEED_VARIABLE, choose_seed, tell
from oracle.databases import own_postgres
from oracle.faults import (
    answer_lost,
    backends_terminated,
    clock_set_back,
    descriptors_run_out,
    listener_terminated,
    postgres_crashes,
    sequencer_raises,
    server_killed,
    statement_timeout_fires,
    unreachable,
    worker_killed,
)
from oracle.stage import Stage, staged
from oracle.verdict import Row, table
from oracle.wire import get, metric, until_so
from prometheus_client.parser import text_string_to_metric_families

from sse_labels.embedded import EmbeddedPostgres

from support.database import until

#: How long after a fault's end the last consumer may need for a new label, in seconds.
RECOVERY_SECONDS = 10.0

Strike = Callable[[Stage], Awaitable[Any]]


class Faults:
    """Runs faults under the oracle, and keeps the rows of the report."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.postgres = postgres
        self.seed = choose_seed()
        self.rows: list[Row] = []

    async def strike(
        self, fault: str, *strikes: Strike, statement_timeout: str = "0", **options: str
    ) -> Stage:
        """Let each strike happen under load; fail unless everything arrived, once, in order."""
        async with staged(
            self.postgres,
            f"{self.seed}",
            options={name.replace("_", "-"): text for name, text in options.items()},
            statement_timeout=statement_timeout,
        ) as stage:
            await stage.begin()
            for strike in strikes:
                await stage.inject(fault, lambda strike=strike: strike(stage))
            verdict = await stage.end()
            self.rows += [row for row in verdict.rows() if row.times]
            assert verdict.clean, f"{verdict}\n{stage.log()}"
            assert all(one.recovery_seconds < RECOVERY_SECONDS for one in verdict.injections)
            assert verdict.labels > 20
            return stage


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    with own_postgres() as postgres:
        made = Faults(postgres)
        yield made
    tell(request.config, f"{SEED_VARIABLE}={made.seed}\n{table(made.rows)}")


async def test_nothing_is_lost_when_the_server_is_killed_and_restarted(faults: Faults) -> None:
    await faults.strike("server killed", server_killed, server_killed)


async def test_nothing_is_lost_when_workers_are_killed_and_no_count_of_the_others_goes_back(
    faults: Faults,
) -> None:
    async def strike(stage: Stage) -> None:
        assert stage.program is not None
        await asyncio.to_thread(stage.program.wait_for, "serving: address=.* workers=2$")
        async with counts_that_only_rise(stage.port):
            for place in (1, 2, 1, 2):
                await worker_killed(stage, place)

    stage = await faults.strike("worker killed", strike, workers="2")
    assert stage.program is not None
    assert "Traceback" not in stage.program.errors


@asynccontextmanager
async def counts_that_only_rise(port: int) -> AsyncIterator[None]:
    """Scrape the metrics in parallel all the time; fail when one of a worker fell."""
    highest: dict[tuple[str, ...], float] = {}
    scrapes = 0

    async def scrape() -> None:
        nonlocal scrapes
        while True:
            before = dict(highest)
            try:
                status, _, text = await get(port, "/metrics")
            except OSError:
                continue  # it was a killed worker's
            assert status == 200
            families = list(text_string_to_metric_families(text.decode()))
            # One that took another's place begins again, as Prometheus expects of a process.
            began = {
                sample.labels["worker"]: str(sample.value)
                for family in families
                if family.name == "process_start_time_seconds"
                for sample in family.samples
            }
            shown = {
                (began[sample.labels["worker"]], sample.name, str(sample.labels)): sample.value
                for family in families
                if family.type in ("counter", "histogram")
                for sample in family.samples
            }
            assert shown
            for name, value in before.items():
                assert shown.get(name, value) >= value, (name, value, shown[name])
            for name, value in shown.items():
                highest[name] = max(value, highest.get(name, 0))
            scrapes += 1

    def replaced() -> list[float]:
        """How many workers were replaced, by their place, as far as it was shown."""
        name = "sse_labels_workers_replaced_total"
        series = [(name, str({"worker": worker})) for worker in ("1", "2")]
        return [max((v for key, v in highest.items() if key[1:] == each), default=0)
                for each in series]  # fmt: skip

    async with asyncio.TaskGroup() as tasks:
        scrapers = [tasks.create_task(scrape()) for _ in range(3)]
        yield
        # The last ones serve; each must also be shown, with how many there were before it.
        await until(lambda: replaced() == [2, 2])
        for scraper in scrapers:
            scraper.cancel()
    assert scrapes > 20


async def test_nothing_is_lost_when_postgresql_crashes_twice(faults: Faults) -> None:
    await faults.strike("PostgreSQL crashes", postgres_crashes, postgres_crashes)


async def test_nothing_is_lost_when_the_listening_backend_is_terminated(faults: Faults) -> None:
    await faults.strike("listener terminated", listener_terminated)


async def test_nothing_is_lost_when_all_backends_are_terminated(faults: Faults) -> None:
    await faults.strike("all backends terminated", *[backends_terminated] * 3)


async def test_nothing_is_lost_when_a_statement_timeout_fires(faults: Faults) -> None:
    await faults.strike("statement_timeout", statement_timeout_fires, statement_timeout="400ms")


async def test_streams_stay_open_while_the_database_refuses_connections(faults: Faults) -> None:
    await faults.strike("database refuses", lambda stage: unreachable(stage, "refused", 3))


async def test_streams_stay_open_while_the_database_is_behind_a_black_hole(faults: Faults) -> None:
    await faults.strike("database swallows", lambda stage: unreachable(stage, "swallowed", 5))


async def test_publish_whose_answer_is_lost_is_stored_once(faults: Faults) -> None:
    stage = await faults.strike(
        "publish cut off",
        *[lambda stage: answer_lost(stage, before=False)] * 3,
        *[lambda stage: answer_lost(stage, before=True)] * 2,
    )
    assert sum(publisher.refused.total() for publisher in stage.publishers) >= 5


async def test_nothing_is_lost_when_the_clock_is_set_back(faults: Faults) -> None:
    await faults.strike("clock set back", clock_set_back)


async def test_nothing_is_lost_when_the_sequencer_raises(faults: Faults) -> None:
    await faults.strike("sequencer raises", sequencer_raises, sequencer_raises)


async def test_nothing_is_lost_when_descriptors_run_out(faults: Faults) -> None:
    await faults.strike("no descriptors left", descriptors_run_out)


async def test_nothing_is_lost_when_the_ring_holds_almost_nothing(faults: Faults) -> None:
    async def hurry(stage: Stage) -> None:
        chunks = stage.consumers[0]
        seen = len(chunks.transcript)
        await until(lambda: len(chunks.transcript) > seen + 300)

    await faults.strike("full ring", hurry, ring_max_bytes="2KiB", page_cache_max_bytes="0")


async def test_server_ends_with_a_message_when_the_database_goes_back(faults: Faults) -> None:
    async with staged(faults.postgres, faults.seed) as stage:
        database = stage.database
        seqs = database.insert(50)

        async def streamed() -> bool:
            return await metric(stage.port, "sse_labels_head_seq") == seqs[-1]

        await until_so(streamed)
        stage.proxy.refuse()
        await stage.until_ready(503)
        database.execute("ALTER TABLE label DISABLE TRIGGER USER")
        database.execute("DELETE FROM label WHERE id > 10")
        database.execute("ALTER TABLE label ENABLE TRIGGER USER")
        database.execute("SELECT setval(pg_get_serial_sequence('label', 'id'), 10)")
        await stage.proxy.accept()
        assert stage.program is not None
        status = await asyncio.to_thread(stage.program.wait)
        assert status == 1
        assert "the database went back or was rebuilt" in stage.program.err[-1]
        assert stage.program.err[-1].startswith("sse-labels: ")
