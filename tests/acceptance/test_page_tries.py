"""How often the page asks a server that refuses, is full or closes: as its back-off allows.

Tries are counted at the door. What is allowed is computed from the back-off's own parameters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import NamedTuple

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, expect

from support.browser import Dashboard, chromium
from support.database import until
from support.door import (
    Answer,
    Door,
    closes,
    delivers,
    door,
    is_full,
    opens_and_closes,
    says_503,
    stays_open,
)
from support.reading import PATIENCE_SECONDS

MONTH_SECONDS = 2_592_000
#: How long tries are counted where the page's clock is the real one: in a SharedWorker.
WINDOW_SECONDS = 4.5
#: `visibilitychange` to hidden ends a connection of the page's own after so long.
RESTS_AFTER_MS = 5000
#: How often the dashboard asks whether the server is ready.
ASKS_SECONDS = 5.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Parameters(NamedTuple):
    """Of the back-off, in ms."""

    first: int
    longest: int
    least: int
    hint_max: int
    jitter: float

    def wait(self, number: int, server: Server) -> float:
        """Return the shortest wait after the failure of this number, from 0."""
        base = max(self.least, self.first if server.retry is None else server.retry)
        grown = max(base, min(self.longest, base * 2**number))
        return max(grown, min(server.asked, self.hint_max))

    def allowed(self, seconds: float, server: Server) -> int:
        """Return how many tries fit into so many seconds, if all waits are the shortest."""
        tries, end = 1, 0.0
        while (end := end + self.wait(tries - 1, server)) <= 1000 * seconds:
            tries += 1
        return tries


class Server(NamedTuple):
    """How a server answers, and how long it asks to wait, in ms."""

    answer: Answer
    #: By `retry:`, from the first answer on.
    retry: int | None = None
    #: By `Retry-After`.
    asked: int = 0


SERVERS = {
    "closes": Server(closes),
    "opens and closes": Server(opens_and_closes, retry=1),
    "full": Server(is_full, retry=3000),
    "503": Server(says_503(lambda: "5"), asked=5000),
    "503 for a month": Server(says_503(lambda: f"{MONTH_SECONDS}"), asked=1000 * MONTH_SECONDS),
    "503 until a date": Server(
        says_503(lambda: formatdate(time.time() + MONTH_SECONDS, usegmt=True)),
        asked=1000 * MONTH_SECONDS,
    ),
    "503 without end": Server(says_503(lambda: "9" * 400), asked=1000 * MONTH_SECONDS),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    async with await browser.new_context() as made:
        yield made


async def parameters_in(page: Page, opened: Door) -> Parameters:
    """Read them where they are."""
    found = await page.evaluate(
        f"""import("{opened.url}/reading/backoff.js").then((all) => [
          all.RETRY_MS, all.RETRY_MAX_MS, all.RETRY_MIN_MS, all.HINT_MAX_MS, all.JITTER])"""
    )
    return Parameters(*found)


class Elsewhere:
    """A page of another origin whose clock stands still until it is moved."""

    def __init__(self, page: Page, opened: Door) -> None:
        self.page = page
        self.door = opened

    @classmethod
    async def open(cls, context: BrowserContext, opened: Door) -> Elsewhere:
        await context.clock.install(time=0)
        await context.clock.pause_at(1000)
        page = await context.new_page()
        await page.goto(opened.elsewhere)
        return cls(page, opened)

    async def wait_ms(self) -> float:
        """Return how long the page waits, once it waits for its next try."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                left = await self.page.evaluate("globalThis.stream?.state.retryAt - Date.now()")
                if left is not None and left > 0:
                    return float(left)
                await asyncio.sleep(0.01)

    async def passes(self, ms: float) -> None:
        """Move the clock; what the page asks for by then has come to the door."""
        await self.page.clock.fast_forward(round(ms))
        # Asked after all tries, and answered by the same server.
        await self.page.evaluate(f"fetch('{self.door.url}/asked')")

    async def tried(self, times: int) -> None:
        """Wait until it has tried so often."""
        await until(lambda: len(self.door.tries) >= times)
        assert len(self.door.tries) == times


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
async def test_each_wait_lasts_as_long_as_it_must_and_ends(
    context: BrowserContext, server: Server
) -> None:
    async with door(server.answer) as opened:
        page = await Elsewhere.open(context, opened)
        parameters = await parameters_in(page.page, opened)
        for number in range(7):
            await page.tried(number + 1)
            wait = await page.wait_ms()
            shortest = parameters.wait(number, server)
            assert shortest - 1 <= wait <= shortest * (1 + parameters.jitter) + 1
            await page.passes(wait - 2)
            await page.tried(number + 1)
            await page.passes(4)
        assert wait < 2**31


@pytest.mark.parametrize(
    ("name", "tabs"),
    [
        ("closes", 1),
        ("closes", 10),
        ("opens and closes", 10),
        ("full", 10),
        ("503 for a month", 10),
    ],
)
async def test_tabs_of_a_browser_try_as_often_as_one(
    context: BrowserContext, name: str, tabs: int
) -> None:
    server = SERVERS[name]
    async with door(server.answer) as opened:
        # Views that differ, so that connections do.
        queries = ["", "?from=everything", "?from=3&values=spam", "?values=rude"]
        opened_tabs = [
            await Dashboard.open(context, opened.url, queries[number % len(queries)])
            for number in range(tabs)
        ]
        parameters = await parameters_in(opened_tabs[0].page, opened)
        for tab in opened_tabs[1::2]:
            await tab.page.close()
        for query in queries[: tabs // 3]:
            await Dashboard.open(context, opened.url, query)
        await opened_tabs[0].says("Next try in")
        await asyncio.sleep(max(0.0, opened.tries[0] + WINDOW_SECONDS - time.monotonic()))
        seconds = time.monotonic() - opened.tries[0]
        assert 1 <= len(opened.tries) <= parameters.allowed(seconds, server)
        # Nor does it ask for anything else of a server that gives no stream.
        assert opened.others == []


async def test_tabs_of_another_origin_try_as_often_as_one_each(
    context: BrowserContext,
) -> None:
    tabs, server = 10, SERVERS["closes"]
    async with door(server.answer) as opened:
        pages = [await context.new_page() for _ in range(tabs)]
        for page in pages:
            await page.goto(opened.elsewhere)
        parameters = await parameters_in(pages[0], opened)
        await asyncio.sleep(WINDOW_SECONDS)
        seconds = time.monotonic() - opened.tries[0]
        assert tabs <= len(opened.tries) <= tabs * parameters.allowed(seconds, server)


async def test_person_ends_a_wait_but_cannot_make_a_storm(context: BrowserContext) -> None:
    async with door(SERVERS["503 for a month"].answer) as opened:
        page = await Elsewhere.open(context, opened)
        parameters = await parameters_in(page.page, opened)
        for number in range(1, 4):
            await page.wait_ms()
            await page.tried(number)
            await page.page.evaluate("for (let n = 0; n < 99; n++) globalThis.stream.retry()")
            await page.passes(parameters.least - 2)
            await page.tried(number)
            await page.passes(4)
            await page.tried(number + 1)


async def test_online_ends_a_wait_for_a_server_that_could_not_be_reached(
    context: BrowserContext,
) -> None:
    online = """async () => {
      for (let n = 0; n < 99; n++) {
        dispatchEvent(new Event("online"));
        await new Promise((resolve) => queueMicrotask(resolve));
      }
    }"""
    async with door(closes) as opened:
        page = await Elsewhere.open(context, opened)
        parameters = await parameters_in(page.page, opened)
        for number in range(4):
            await page.tried(number + 1)
            await page.passes(await page.wait_ms() + 2)
        await page.tried(5)
        assert await page.wait_ms() > 2 * parameters.first
        for number in range(5, 8):
            await page.wait_ms()
            await page.page.evaluate(online)
            await page.passes(parameters.first - 2)
            await page.tried(number)
            await page.page.evaluate(online)
            await page.passes(4)
            await page.tried(number + 1)
        # Somebody answers: the network was not what was wrong.
        opened.answer = SERVERS["503 for a month"].answer
        await page.passes(await page.wait_ms() + 2)
        await page.tried(9)
        await page.wait_ms()
        await page.page.evaluate(online)
        await page.passes(parameters.hint_max - 2)
        await page.tried(9)


async def test_page_that_is_hidden_and_seen_again_goes_on_waiting(context: BrowserContext) -> None:
    async with door(SERVERS["503 for a month"].answer) as opened:
        page = await Elsewhere.open(context, opened)
        await page.wait_ms()
        for _ in range(5):
            for visibility, ms in (("hidden", RESTS_AFTER_MS + 1), ("visible", 1)):
                await page.page.evaluate(
                    f"""Object.defineProperty(document, "visibilityState",
                      {{value: "{visibility}", configurable: true}});
                    document.dispatchEvent(new Event("visibilitychange"))"""
                )
                await page.passes(ms)
        assert await page.page.evaluate("stream.state.name") == "connecting"
        await page.tried(1)


async def test_stream_that_delivers_ends_the_back_off(context: BrowserContext) -> None:
    """One that only opens does not: that is among the servers above."""
    async with door(closes) as opened:
        page = await Elsewhere.open(context, opened)
        parameters = await parameters_in(page.page, opened)
        for number in range(4):
            await page.tried(number + 1)
            await page.passes(await page.wait_ms() + 2)
        await page.tried(5)
        opened.answer = delivers
        for number in range(5, 8):
            await page.passes(await page.wait_ms() + 2)
            await page.tried(number + 1)
            wait = await page.wait_ms()
            assert wait <= parameters.first * (1 + parameters.jitter) + 1


async def test_readiness_is_asked_for_once_for_all_tabs(context: BrowserContext) -> None:
    async with door(stays_open) as opened:
        begun = time.monotonic()
        tabs = [await Dashboard.open(context, opened.url) for _ in range(5)]
        for tab in tabs:
            await expect(tab.page.locator("#head")).to_have_text("9")
        asked = opened.others.count("/health/ready")
        assert 1 <= asked <= (time.monotonic() - begun) / ASKS_SECONDS


async def test_readiness_is_not_asked_for_by_who_does_not_want_to_know(
    context: BrowserContext,
) -> None:
    async with door(stays_open) as opened:
        page = await Elsewhere.open(context, opened)

        async def is_live() -> bool:
            return await page.page.evaluate("globalThis.stream?.state.name") == "live"

        await until(is_live)
        for _ in range(5):
            await page.passes(1000 * ASKS_SECONDS)
        assert set(opened.others) == {"/asked"}
