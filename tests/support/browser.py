"""A real Chromium, and the dashboard as a person sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from support.reading import PATIENCE_SECONDS
from support.system import program

ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

expect.set_options(timeout=1000 * PATIENCE_SECONDS)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser with an empty profile."""
    path = program("chromium")
    # Playwright's driver needs it.
    program("libatomic.so.1")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=path, args=ARGUMENTS, chromium_sandbox=False
        )
        try:
            yield browser
        finally:
            await browser.close()


class Dashboard:
    """One tab that shows the dashboard."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        #: Errors that the page did not catch, and violations of its content policy.
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        # Chromium also logs each failed request there. Some tests make requests fail.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    @classmethod
    async def open(cls, context: BrowserContext, url: str, query: str = "") -> Dashboard:
        """Open a tab and wait for its script."""
        dashboard = cls(await context.new_page(), url)
        await dashboard.page.goto(f"{url}/{query}")
        return dashboard

    async def says(self, words: str) -> None:
        """Wait until the state contains these words."""
        await expect(self.page.locator("#state-words")).to_contain_text(words)

    async def colour(self) -> str:
        """The colour of the dot beside the state."""
        dot = self.page.locator("#state .dot")
        return str(await dot.evaluate("dot => getComputedStyle(dot).backgroundColor"))

    async def happened(self, words: str) -> None:
        """Wait until `What happened` contains these words."""
        await expect(self.page.locator("#happened")).to_contain_text(words)

    async def rows(self) -> list[int]:
        """The seqs of the rows, from the top."""
        seqs = await self.page.locator("#rows li").evaluate_all(
            "rows => rows.map((row) => Number(row.dataset.seq))"
        )
        return [int(seq) for seq in seqs]

    async def shows(self, wanted: list[int]) -> None:
        """Wait until the rows have these seqs, given in rising order."""
        newest_first = wanted[::-1]
        await self.until(lambda rows: rows == newest_first, f"{newest_first[:20]}")

    async def until(self, enough: Callable[[list[int]], bool], what: str) -> None:
        """Wait until the rows are as wanted."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not enough(await self.rows()):
                    await self.page.wait_for_timeout(50)
        except TimeoutError:
            raise AssertionError(f"expected {what}, got {(await self.rows())[:20]}") from None

    async def cells(self, name: str) -> list[str]:
        """The texts of a column, from the top."""
        return await self.page.locator(f"#rows .{name}").all_text_contents()
