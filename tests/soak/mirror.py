"""The long run of a mirror: the real Ozone and the real skyware labeler publish without a pause,
and they and the mirror are killed in random order; then all databases are compared.

    make soak SECONDS=600
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from oracle import SEED_VARIABLE, chance, choose_seed, tell

from support.database import TestDatabase, until
from support.labelers import (
    RealLabeler,
    RealOzone,
    Skyware,
    Unanswered,
    mirror_program,
    mirrored,
    named,
    verdict,
)

SECONDS = float(os.environ.get("SSE_LABELS_SOAK_SECONDS") or 600)


class Publishing:
    """Publishes one label after the other, and goes on after each kill."""

    def __init__(self, labeler: RealLabeler, numbers: itertools.count[int]) -> None:
        self._labeler = labeler
        self._numbers = numbers
        self.unanswered = 0
        self.over = False
        #: Set while the labeler runs.
        self.up = asyncio.Event()

    async def run(self) -> None:
        while not self.over:
            await self.up.wait()
            try:
                await self._labeler.publish(next(self._numbers))
            except Unanswered:
                self.unanswered += 1
                # Whoever struck it starts it again.
                await asyncio.sleep(0.01)

    async def strike(self) -> None:
        self.up.clear()
        await self._labeler.kill()
        await self._labeler.start()
        self.up.set()


async def test_a_mirror_loses_and_doubles_nothing_in_a_long_run(
    database: TestDatabase,
    empty_database: TestDatabase,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    seed = choose_seed()
    tell(request.config, f"{SEED_VARIABLE}={seed}, {SECONDS:g} s of mirroring")
    dice = chance(seed, "faults")
    ozone, skyware = RealOzone(empty_database), Skyware(tmp_path)
    numbers = itertools.count(1)
    publishing = {each: Publishing(each, numbers) for each in (ozone, skyware)}
    kills: Counter[str] = Counter()
    try:
        with mirror_program(database, named(ozone), named(skyware)) as mirror:
            for each in publishing:
                await each.start()
                publishing[each].up.set()
            await mirror.start()
            tasks = [asyncio.create_task(each.run()) for each in publishing.values()]
            ends = time.monotonic() + SECONDS
            while time.monotonic() < ends:
                await asyncio.sleep(dice.uniform(0.1, 2.0))
                victim = dice.choice([mirror, mirror, *publishing])
                kills[type(victim).__name__] += 1
                if isinstance(victim, RealOzone | Skyware):
                    await publishing[victim].strike()
                else:
                    await victim.kill()
                    await victim.start()
            for work in publishing.values():
                work.over = True
            await asyncio.gather(*tasks)
            for each in publishing:
                await each.publish(next(numbers))
                last = each.published[-1:]
                await until(
                    lambda each=each, last=last: mirrored(database, each.did)[-1:] == last,
                    seconds=90,
                )
        told = [verdict(each, mirrored(database, each.did)) for each in publishing]
        struck = ", ".join(f"{name} {count}" for name, count in kills.items())
        unanswered = sum(each.unanswered for each in publishing.values())
        tell(request.config, f"{'; '.join(told)}; kills: {struck}; unanswered: {unanswered}")
    finally:
        await asyncio.gather(ozone.close(), skyware.close())
