"""The long run: every fault, again and again in random order, under load, with the oracle.

    make soak SECONDS=600

Its name keeps it out of an ordinary run: pytest collects it only when it is named. It ends with
the report, and fails when anything was lost, doubled, reordered or altered. The ring is small
all the time, so that a "full ring" needs no turn of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from oracle import SEED_VARIABLE, chance, choose_seed, tell
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
)
from oracle.stage import Stage, staged

SECONDS = float(os.environ.get("SSE_LABELS_SOAK_SECONDS") or 600)
#: How long the database is away, at most once in a run shorter than ten minutes.
AWAY_SECONDS = 30.0

FAULTS: dict[str, Callable[[Stage], Awaitable[Any]]] = {
    "server killed": server_killed,
    "PostgreSQL crashes": postgres_crashes,
    "listener terminated": listener_terminated,
    "all backends terminated": backends_terminated,
    "statement_timeout": statement_timeout_fires,
    "publish cut before it": lambda stage: answer_lost(stage, before=True),
    "publish cut at its answer": lambda stage: answer_lost(stage, before=False),
    "clock set back": clock_set_back,
    "sequencer raises": sequencer_raises,
    "no descriptors left": descriptors_run_out,
    "database refuses": lambda stage: unreachable(stage, "refused", AWAY_SECONDS),
    "database swallows": lambda stage: unreachable(stage, "swallowed", AWAY_SECONDS),
}


class Life:
    """What one process of the server needed, between two restarts."""

    def __init__(self, stage: Stage) -> None:
        self.pid = stage.pid
        self.seconds = 0.0
        self.first_mib = self.last_mib = stage.memory_mib("VmRSS")
        self._began = time.monotonic()
        self.look(stage)

    def look(self, stage: Stage) -> None:
        """Note what it has now."""
        self.seconds = time.monotonic() - self._began
        self.last_mib = stage.memory_mib("VmRSS")
        self._most_mib = stage.memory_mib("VmHWM")
        self._descriptors = len(stage.descriptors())

    def __str__(self) -> str:
        return (
            f"{self.first_mib:.1f} MiB at first, {self.last_mib:.1f} MiB at last, at most "
            f"{self._most_mib:.1f} MiB in {self.seconds:.0f} s, {self._descriptors} descriptors"
        )


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
            lives = [Life(stage)]
            tell(request.config, f"the server at first: {lives[0].first_mib:.1f} MiB")
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
                if stage.pid != lives[-1].pid:
                    lives.append(Life(stage))
                lives[-1].look(stage)
                told = f"{fault}: {done.recovery_seconds:.2f} s, {lives[-1].last_mib:.1f} MiB"
                tell(request.config, f"{left:6.0f} s left  {told}")
            tell(request.config, f"the server at last: {lives[-1]}")
            # A process that was killed took its memory with it: the longest life says most.
            longest = max(lives, key=lambda life: life.seconds)
            tell(request.config, f"of {len(lives)} servers the one that lived longest: {longest}")
            verdict = await stage.end()
            tell(request.config, f"{verdict.labels} labels, {verdict.delivered} deliveries")
            tell(request.config, str(verdict))
            assert verdict.clean, stage.log()
