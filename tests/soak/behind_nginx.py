"""The long run through nginx: its faults and its servers', in random order, then the oracle.

    make soak SECONDS=600

As soak.py, for what stands between a server and its readers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Awaitable, Callable

import pytest
from oracle import SEED_VARIABLE, chance, choose_seed, tell
from oracle.behind_nginx import Behind, behind_nginx
from oracle.databases import own_postgres

SECONDS = float(os.environ.get("SSE_LABELS_SOAK_SECONDS") or 600)
FAULTS: dict[str, Callable[[Behind], Awaitable[None]]] = {
    "nginx reloads": Behind.reload,
    "nginx restarted": lambda behind: behind.restart_nginx(signal.SIGTERM),
    "nginx killed": lambda behind: behind.restart_nginx(signal.SIGKILL),
    "one of two servers drained": lambda behind: behind.restart_server(signal.SIGTERM),
    "one of two servers killed": lambda behind: behind.restart_server(signal.SIGKILL),
}


async def test_nothing_is_lost_behind_nginx_in_a_long_run(request: pytest.FixtureRequest) -> None:
    seed = choose_seed()
    tell(request.config, f"{SEED_VARIABLE}={seed}, {SECONDS:g} s behind nginx")
    dice = chance(seed, "faults")
    ends = time.monotonic() + SECONDS
    with own_postgres() as postgres:
        async with behind_nginx(postgres, seed) as behind:
            bag: list[str] = []
            while time.monotonic() < ends:
                if not bag:
                    # Every fault once before any comes again.
                    bag = dice.sample(sorted(FAULTS), len(FAULTS))
                fault = bag.pop()
                done = await behind.stage.inject(fault, lambda fault=fault: FAULTS[fault](behind))
                left = ends - time.monotonic()
                tell(request.config, f"{left:6.0f} s left  {fault}: {done.recovery_seconds:.2f} s")
            verdict = await behind.stage.end()
            tell(request.config, f"{verdict.labels} labels, {verdict.delivered} deliveries")
            tell(request.config, str(verdict))
            assert verdict.clean, f"{behind.stage.log()}\n{behind.proxy.errors()[-4000:]}"
