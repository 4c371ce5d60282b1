"""The long run: every fault, again and again in random order, under load, with the oracle.

    SSE_LABELS_SOAK_SECONDS=600 pytest -s tests/soak/soak.py

Its name keeps it out of an ordinary run: pytest collects it only when it is named. It ends with
the report, and fails when anything was lost, doubled, reordered or altered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from oracle import SEED_VARIABLE, chance, choose_seed, tell
from oracle.stage import Stage, own_postgres, staged

SECONDS = float(os.environ.get("SSE_LABELS_SOAK_SECONDS") or 600)
#: How long the database is away, at most once in a run shorter than ten minutes.
AWAY_SECONDS = 30.0

FAULTS: dict[str, Callable[[Stage], Awaitable[Any]]] = {
    "server killed": Stage.server_killed,
    "PostgreSQL crashes": Stage.postgres_crashes,
    "listener terminated": Stage.listener_terminated,
    "all backends terminated": Stage.backends_terminated,
    "statement_timeout": Stage.statement_timeout_fires,
    "publish cut before it": lambda stage: stage.answer_lost(before=True),
    "publish cut at its answer": lambda stage: stage.answer_lost(before=False),
    "clock set back": Stage.clock_set_back,
    "database refuses": lambda stage: stage.unreachable("refused", AWAY_SECONDS),
    "database swallows": lambda stage: stage.unreachable("swallowed", AWAY_SECONDS),
}


async def test_nothing_is_lost_in_a_long_run(request: pytest.FixtureRequest) -> None:
    seed = choose_seed()
    tell(request.config, f"{SEED_VARIABLE}={seed}, {SECONDS:g} s")
    dice = chance(seed, "faults")
    ends = time.monotonic() + SECONDS
    with own_postgres() as postgres:
        async with staged(
            postgres, seed, options={"ring-max-bytes": "64KiB"}, statement_timeout="400ms",
            pause_seconds=0.04,
        ) as stage:  # fmt: skip
            await stage.begin()
            bag: list[str] = []
            while time.monotonic() < ends:
                if not bag:
                    # Every fault once before any comes again.
                    bag = dice.sample(sorted(FAULTS), len(FAULTS))
                fault = bag.pop()
                left = ends - time.monotonic()
                if fault.startswith("database ") and left < AWAY_SECONDS:
                    continue
                done = await stage.inject(fault, lambda fault=fault: FAULTS[fault](stage))
                tell(request.config, f"{left:6.0f} s left  {fault}: {done.recovery_seconds:.2f} s")
            verdict = await stage.end()
            tell(request.config, f"{verdict.labels} labels, {verdict.delivered} deliveries")
            tell(request.config, str(verdict))
            assert verdict.clean, stage.log()
