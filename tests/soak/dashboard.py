"""The dashboard for minutes on end, at a hundred labels a second: it does not grow, nor stutter.

    make soak SECONDS=300

Frame times are told, not judged: they are the machine's as much as the page's. What is judged:
rows stay bounded and are the table's newest, and after a collection of garbage the page has no
more nodes, listeners or memory than it had when it was warm.
"""

from __future__ import annotations

import asyncio
import os
import time
from statistics import median, quantiles

import pytest
from oracle import tell
from playwright.async_api import CDPSession

from support.browser import Dashboard, chromium
from support.database import TestDatabase
from support.server import RunServer

SECONDS = float(os.environ.get("SSE_LABELS_SOAK_SECONDS") or 300)
LABELS_A_SECOND = 100
ROWS_MAX = 200
#: By then all rows, bars and counts are there.
WARM_SECONDS = min(30.0, SECONDS / 4)
#: What a page may have more than when it was warm, in MiB: timers, and the engine's own caches.
SPARE_MIB = 2.0
#: Two rows' worth, since a look may fall into the midst of a draw.
SPARE_NODES = 40

WATCH_FRAMES = """() => {
  globalThis.frames = [];
  let last = performance.now();
  const next = (now) => { frames.push(now - last); last = now; requestAnimationFrame(next); };
  requestAnimationFrame(next);
}"""


async def sizes(session: CDPSession) -> dict[str, float]:
    """What the page holds once all garbage is gone."""
    await session.send("HeapProfiler.collectGarbage")
    found = await session.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in found["metrics"]}


async def publish_until(end: float, database: TestDatabase) -> None:
    begun, made = time.monotonic(), 0
    while (now := time.monotonic()) < end:
        wanted = int((now - begun) * LABELS_A_SECOND)
        if wanted > made:
            await asyncio.to_thread(database.fill, wanted - made)
            made = wanted
        await asyncio.sleep(0.05)


async def test_dashboard_neither_grows_nor_loses_for_minutes(
    run_server: RunServer, database: TestDatabase, request: pytest.FixtureRequest
) -> None:
    async with run_server() as server, chromium() as browser:
        context = await browser.new_context()
        dashboard = await Dashboard.open(context, server.url)
        await dashboard.says("Live")
        session = await context.new_cdp_session(dashboard.page)
        await session.send("Performance.enable")
        begun = time.monotonic()
        publishing = asyncio.create_task(publish_until(begun + SECONDS, database))
        await asyncio.sleep(WARM_SECONDS)
        # The driver's own script is in the page from its first question on.
        await dashboard.rows()
        warm = await sizes(session)
        await dashboard.page.evaluate(WATCH_FRAMES)
        await publishing
        frames = [float(each) for each in await dashboard.page.evaluate("frames")]
        await dashboard.page.evaluate("frames.length = 0")
        stored = [event["seq"] for event in database.stored()]
        await dashboard.shows(stored[-ROWS_MAX:])
        last = await sizes(session)
        assert dashboard.complaints == []

    heap = {name: each["JSHeapUsedSize"] / 2**20 for name, each in (("warm", warm), ("last", last))}
    late = sum(each > 50 for each in frames)
    tell(
        request.config,
        f"dashboard: {len(stored)} labels in {SECONDS:.0f} s; frames: {len(frames)}, "
        f"median {median(frames):.1f} ms, p99 {quantiles(frames, n=100)[98]:.1f} ms, "
        f"longest {max(frames):.0f} ms, {late} over 50 ms; "
        f"heap {heap['warm']:.2f} MiB warm, {heap['last']:.2f} MiB at last; "
        f"nodes {warm['Nodes']:.0f}, {last['Nodes']:.0f}; listeners "
        f"{warm['JSEventListeners']:.0f}, {last['JSEventListeners']:.0f}",
    )
    assert heap["last"] < heap["warm"] + SPARE_MIB
    assert last["Nodes"] <= warm["Nodes"] + SPARE_NODES
    assert last["JSEventListeners"] <= warm["JSEventListeners"]
