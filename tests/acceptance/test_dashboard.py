"""The dashboard and `labels.js`, driven in a real Chromium as a person would."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, BrowserContext, expect

from sse_labels.errors import ConsumerTooSlow

from support.browser import Dashboard, chromium
from support.database import TestDatabase, until
from support.program import QUICK_SERVER, REPOSITORY, free_port, running
from support.reading import reading
from support.server import RunServer, Server, away

AXE = Path(__file__).parents[1] / "javascript/node_modules/axe-core/axe.min.js"
SECRET = "0123456789abcdef0123456789abcdef"
#: Reconnects come soon.
SOON = {"retry_min_seconds": 0.05, "retry_max_seconds": 0.1}
#: When a page that is hidden ends its connection.
RESTS_AFTER_MS = 5000
PHONE = {"width": 390, "height": 844}


# One browser for all tests, so one event loop too. Each test has a profile of its own in it.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def context(
    browser: Browser, request: pytest.FixtureRequest
) -> AsyncIterator[BrowserContext]:
    async with await browser.new_context(**getattr(request, "param", {})) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def server(run_server: RunServer) -> AsyncIterator[Server]:
    """As everywhere, in the event loop of these tests."""
    async with run_server() as running:
        yield running


async def test_rows_are_the_table_newest_first(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(30)
    dashboard = await Dashboard.open(context, server.url, "?from=everything")
    await dashboard.shows(list(range(1, 31)))
    database.insert(5)
    stored = database.stored()
    await dashboard.shows([event["seq"] for event in stored])

    newest_first = [event["labels"][0] for event in reversed(stored)]
    assert await dashboard.cells("uri") == [label["uri"] for label in newest_first]
    assert await dashboard.cells("src") == [label["src"] for label in newest_first]
    assert await dashboard.cells("val") == [
        f"not {label['val']}" if label.get("neg") else label["val"] for label in newest_first
    ]
    assert dashboard.complaints == []


async def test_page_asks_nobody_but_its_server(server: Server, context: BrowserContext) -> None:
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    dashboard = await Dashboard.open(context, server.url)
    await dashboard.says("Live")
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(server.url).netloc}
    assert len(asked) > 5


async def test_filter_drops_what_does_not_pass_and_stands_in_the_address(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(30)
    dashboard = await Dashboard.open(context, server.url, "?from=everything")
    await dashboard.shows(list(range(1, 31)))
    page = dashboard.page
    await page.get_by_role("textbox", name="Value").fill("spam, rude")
    await page.get_by_role("textbox", name="Value").press("Enter")
    database.fill(30)
    wanted = [
        event["seq"] for event in database.stored() if event["labels"][0]["val"] in ("spam", "rude")
    ]
    await dashboard.shows(wanted)
    assert page.url == f"{server.url}/?from=everything&values=rude&values=spam"
    await page.reload()
    await dashboard.shows(wanted)


@pytest.mark.parametrize("query", ["", "?from=left-off", "?from=290"])
async def test_count_shows_what_the_address_it_makes_shows_when_it_is_loaded_again(
    server: Server, database: TestDatabase, context: BrowserContext, query: str
) -> None:
    database.fill(300)
    dashboard = await Dashboard.open(context, server.url, query)
    page = dashboard.page
    await dashboard.says("Live")
    # More than the list keeps, so that older ones of the value are not in it any more.
    database.insert(3, val="rare")
    database.fill(250)
    await expect(page.locator("#position")).to_have_text("553")
    start = {"?from=everything": 0, "?from=290": 290}.get(query, 300)
    rare = [event["seq"] for event in database.stored(start) if event["labels"][0]["val"] == "rare"]
    await page.locator("#by-value button", has_text="rare").click()
    await dashboard.shows(rare)
    address = page.url
    assert address.startswith(f"{server.url}/?from=")
    await page.reload()
    await dashboard.shows(rare)
    assert page.url == address
    [seq] = database.insert(1, val="rare")
    await dashboard.shows([*rare, seq])


@pytest.mark.parametrize(
    ("query", "says"), [("?from=abc", "seq: got 'abc'"), ("?from=999999&values=spam", "Refused: ")]
)
async def test_show_all_leads_back_from_a_bad_start(
    server: Server, database: TestDatabase, context: BrowserContext, query: str, says: str
) -> None:
    dashboard = await Dashboard.open(context, server.url, query)
    page = dashboard.page
    await expect(page.locator("#wrong, #state-words").filter(has_text=says)).to_be_visible()
    await page.get_by_role("button", name="Show all").click()
    await dashboard.says("Live")
    await expect(page.locator("#wrong")).to_be_hidden()
    await expect(page.get_by_role("combobox", name="Start from")).to_have_value("now")
    assert page.url == f"{server.url}/"
    await dashboard.shows(database.insert(2))
    await page.go_back()
    await expect(page.locator("#wrong, #state-words").filter(has_text=says)).to_be_visible()
    await page.go_forward()
    await dashboard.says("Live")
    await expect(page.locator("#wrong")).to_be_hidden()


async def test_rate_is_made_of_whole_seconds(server: Server, context: BrowserContext) -> None:
    await context.clock.install(time=0)
    await context.clock.pause_at(1000)
    page = (await Dashboard.open(context, server.url)).page

    async def rate(script: str) -> tuple[str, list[int]]:
        """What is said of the last minute, and which bars of sixty stand, from the left."""
        path = await page.evaluate(
            f"""async () => {{
              const {{ Rate }} = await import("/dashboard/rate.js");
              globalThis.tested ??= new Rate();
              {script};
              tested.draw();
              return document.getElementById("rate-path").getAttribute("d");
            }}"""
        )
        bars = [bar for bar, each in enumerate(path.split("z")) if each and "v0" not in each]
        return await page.locator("#rate-minute").inner_text(), bars

    assert await rate("tested.start(); tested.add(60)") == ("0.0", [])
    await page.clock.fast_forward(1000)
    assert await rate("") == ("60.0", [59])
    await page.clock.fast_forward(3000)
    assert await rate("") == ("15.0", [59])
    await page.clock.fast_forward(56_000)
    assert await rate("") == ("1.0", [48])
    await page.clock.fast_forward(1000)
    assert await rate("") == ("0.0", [47])
    # The second that was 300 ago is gone before the one that runs takes its place.
    await page.clock.fast_forward(239_000)
    assert await rate("tested.add(5)") == ("0.0", [0])
    await page.clock.fast_forward(1000)
    assert await rate("") == ("0.1", [59])
    assert await rate("tested.clear()") == ("0.0", [])


async def test_wrong_filter_is_named_and_the_stream_goes_on(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    dashboard = await Dashboard.open(context, server.url)
    await dashboard.says("Live")
    await dashboard.page.get_by_role("textbox", name="Source").fill("alice")
    await dashboard.page.get_by_role("textbox", name="Source").press("Enter")
    await expect(dashboard.page.get_by_role("alert")).to_have_text(
        "sources: got 'alice', expected a DID, such as 'did:plc:ewvi7nxzyoun6zhxrhs64oiz'"
    )
    await dashboard.shows(database.insert(2))


async def test_rows_are_bounded_to_the_newest(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(3000)
    dashboard = await Dashboard.open(context, server.url, "?from=everything")
    await dashboard.shows(list(range(2801, 3001)))
    await expect(dashboard.page.locator("#position")).to_have_text("3,000")


async def test_killed_server_comes_back_without_a_missing_or_doubled_row(
    database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(20)
    arguments = ["serve", *QUICK_SERVER, f"--port={free_port()}", "--dsn", database.dsn]
    with running(*arguments) as program:
        dashboard = await Dashboard.open(context, program.url(), "?from=everything")
        await dashboard.shows(list(range(1, 21)))
        program.send(signal.SIGKILL)
        await dashboard.says("Reconnecting")
        await dashboard.says("Goes on after 20; nothing is lost.")
    database.insert(10)
    with running(*arguments) as program:
        program.url()
        await dashboard.says("Live")
        database.insert(5)
        await dashboard.shows([event["seq"] for event in database.stored()])


async def test_restart_is_told_and_resumed_from(
    run_server: RunServer, database: TestDatabase, context: BrowserContext
) -> None:
    port = free_port()
    async with run_server(port=port, **SOON) as server:
        dashboard = await Dashboard.open(context, server.url, "?from=everything")
        await dashboard.shows(database.insert(3))
    await dashboard.happened("The server restarts")
    database.insert(3)
    async with run_server(port=port, **SOON):
        await dashboard.shows([event["seq"] for event in database.stored()])
        await dashboard.says("Live")


async def test_too_slow_is_told_and_nothing_is_lost(
    run_server: RunServer, database: TestDatabase, context: BrowserContext
) -> None:
    async with run_server(**SOON) as server:
        dashboard = await Dashboard.open(context, server.url)
        await dashboard.says("Live")
        await dashboard.shows(database.insert(3))
        [visit] = server.app.site.streams.open.values()
        visit.outbox.close(ConsumerTooSlow("more than 5 events waited to be read"))
        await dashboard.happened("This page was too slow: more than 5 events waited to be read")
        database.insert(3)
        await dashboard.shows([event["seq"] for event in database.stored()])


async def test_outdated_cursor_is_told_with_the_floor(
    run_server: RunServer, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(30)
    database.execute("UPDATE label_stream SET floor = 15")
    database.execute("DELETE FROM label WHERE id < 15")
    async with run_server() as server:
        dashboard = await Dashboard.open(context, server.url, "?from=3")
        await dashboard.happened("OutdatedCursor")
        await dashboard.happened("going on from seq 15")
        await dashboard.shows(list(range(15, 31)))


async def test_full_server_is_told_and_entered_when_there_is_a_place(
    run_server: RunServer, context: BrowserContext
) -> None:
    async with run_server(max_streams=1) as server:
        async with reading(server.stream_url) as reader:
            await reader.until_opened()
            [first] = server.app.site.streams.open
            dashboard = await Dashboard.open(context, server.url)
            await dashboard.says("The server is full")
            await dashboard.says("Next try in")
        await until(lambda: first not in server.app.site.streams.open)
        # By script: it may have tried again by itself in the meantime, and then there is no button.
        await dashboard.page.locator("#retry").dispatch_event("click")
        await dashboard.says("Live")


async def test_refusal_is_told_in_the_servers_words_and_not_tried_again(
    run_server: RunServer, context: BrowserContext
) -> None:
    async with run_server(jwt_secret=SECRET) as server:
        dashboard = await Dashboard.open(context, server.url)
        await dashboard.says("Refused: ")
        await dashboard.says("token")
        asked = server.app.metrics.requests_refused["AuthRequired"]
        await dashboard.page.get_by_role("button", name="Try now").click()
        await until(lambda: server.app.metrics.requests_refused["AuthRequired"] > asked)
        await dashboard.says("Refused: ")


async def test_new_epoch_is_told_and_started_in(
    run_server: RunServer, database: TestDatabase, context: BrowserContext
) -> None:
    port = free_port()
    async with run_server(port=port, **SOON) as server:
        dashboard = await Dashboard.open(context, server.url, "?from=everything")
        await dashboard.shows(database.insert(3))
    database.execute("UPDATE label_stream SET epoch = gen_random_uuid()")
    async with run_server(port=port, **SOON):
        await dashboard.happened("EpochChanged")
        database.insert(1)
        await dashboard.shows([1, 2, 3, 4])


async def test_database_that_is_away_is_told_while_the_stream_is_open(
    run_server: RunServer, database: TestDatabase, context: BrowserContext
) -> None:
    async with run_server() as server:
        tabs = [await Dashboard.open(context, server.url) for _ in range(3)]
        colours = []
        for tab in tabs:
            await tab.says("Live")
            colours.append(await tab.colour())
        with away(database):
            for tab, green in zip(tabs, colours, strict=True):
                await tab.says("The server is not ready: ")
                await tab.says("the database is away")
                assert await tab.colour() != green
                await tab.happened("the database is away")
        for tab, green in zip(tabs, colours, strict=True):
            await tab.says("Live")
            assert await tab.colour() == green
            await tab.shows([])
        await tabs[0].shows(database.insert(2))


async def test_ten_tabs_share_one_connection_and_miss_nothing(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(50)
    tabs = [await Dashboard.open(context, server.url, "?from=everything") for _ in range(5)]
    tabs += [await Dashboard.open(context, server.url, "?from=40") for _ in range(4)]
    tabs += [await Dashboard.open(context, server.url, "?from=now&values=spam")]
    for tab in tabs:
        await tab.says("one connection for 10 tabs")
    database.fill(20)
    await until(lambda: len(server.app.site.streams.open) == 1)
    stored = database.stored()
    for tab in tabs[:5]:
        await tab.shows([event["seq"] for event in stored])
    for tab in tabs[5:9]:
        await tab.shows([event["seq"] for event in stored if event["seq"] > 40])
    spam = [e["seq"] for e in stored if e["seq"] > 50 and e["labels"][0]["val"] == "spam"]
    await tabs[9].shows(spam)
    for tab in tabs[1:]:
        await tab.page.close()
    await expect(tabs[0].page.locator("#state-words")).to_have_text("Live")


async def test_next_visit_goes_on_where_the_last_left_off(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    dashboard = await Dashboard.open(context, server.url)
    await dashboard.says("Live")
    await dashboard.shows(database.insert(4))
    await dashboard.page.close()
    later = database.insert(3)
    dashboard = await Dashboard.open(context, server.url, "?from=left-off")
    await dashboard.shows(later)


async def test_page_without_shared_workers_reads_for_itself_and_rests_while_hidden(
    run_server: RunServer, database: TestDatabase, context: BrowserContext
) -> None:
    await context.add_init_script("delete globalThis.SharedWorker")
    await context.clock.install()
    async with run_server() as server:
        dashboard = await Dashboard.open(context, server.url)
        await dashboard.says("Live")
        first = database.insert(2)
        await dashboard.shows(first)
        await dashboard.page.evaluate(
            """const hidden = {value: "hidden", writable: true};
            Object.defineProperty(document, "visibilityState", hidden);
            document.dispatchEvent(new Event("visibilitychange"))"""
        )
        await context.clock.fast_forward(RESTS_AFTER_MS)
        await until(lambda: not server.app.site.streams.open)
        missed = database.insert(3)
        await dashboard.page.evaluate(
            """document.visibilityState = "visible";
            document.dispatchEvent(new Event("visibilitychange"))"""
        )
        await dashboard.shows([*first, *missed])


async def test_rows_are_held_while_somebody_reads(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(60)
    dashboard = await Dashboard.open(context, server.url, "?from=everything")
    await dashboard.shows(list(range(1, 61)))
    page = dashboard.page
    await page.locator("#scroller").evaluate("scroller => scroller.scrollTop = 300")
    await expect(page.locator("#held")).to_have_text("paused while you read further down")
    database.insert(7)
    button = page.get_by_role("button", name="Show 7 new")
    await expect(button).to_be_visible()
    assert await dashboard.rows() == list(range(60, 0, -1))
    await button.click()
    await dashboard.shows(list(range(1, 68)))

    await page.get_by_role("button", name="Pause").click()
    database.insert(1)
    await expect(page.get_by_role("button", name="Show 1 new")).to_be_visible()
    await page.get_by_role("button", name="Pause").click()
    await dashboard.shows(list(range(1, 69)))


async def test_label_is_read_in_full_by_keyboard_alone(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(12)
    dashboard = await Dashboard.open(context, server.url, "?from=everything")
    await dashboard.shows(list(range(1, 13)))
    page = dashboard.page
    await page.locator("#scroller").focus()
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Label 11")
    await expect(dialog).to_be_visible()
    event = database.stored()[10]
    assert await page.evaluate("JSON.parse(document.getElementById('detail-json').innerText)") == (
        event
    )
    for text in (event["labels"][0]["uri"], event["labels"][0]["src"], event["labels"][0]["cid"]):
        await expect(dialog.locator("dl")).to_contain_text(text)
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await expect(page.locator('li[data-seq="11"] button')).to_be_focused()


# The audit is a script that the page's own policy would not let in.
@pytest.mark.parametrize(
    "context",
    [{"color_scheme": scheme, "bypass_csp": True} for scheme in ("light", "dark")],
    ids=["light", "dark"],
    indirect=True,
)
async def test_axe_finds_nothing_on_desk_phone_and_dialog(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(30)
    dashboard = await Dashboard.open(context, server.url, "?from=everything")
    await dashboard.shows(list(range(1, 31)))
    page = dashboard.page
    await expect(page.locator("#by-source button")).to_have_count(7)
    await page.get_by_text("Read the same elsewhere").click()
    await page.add_script_tag(path=AXE)

    async def violations() -> list[str]:
        found = await page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        return [
            f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}"
            for rule in found["violations"]
            for node in rule["nodes"]
        ]

    assert await violations() == []
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert await violations() == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await page.locator("#rows button").first.click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    assert await violations() == []


async def test_curl_line_on_screen_reads_the_view_on_screen(
    server: Server, database: TestDatabase, context: BrowserContext
) -> None:
    database.fill(30)
    query = "?from=9&values=spam&prefix=at://did:plc:bbb"
    dashboard = await Dashboard.open(context, server.url, query)
    spam = [e for e in database.stored(9) if e["labels"][0]["val"] == "spam"]
    await dashboard.shows([event["seq"] for event in spam])
    await expect(dashboard.page.locator("#curl")).to_contain_text("cursor=3")
    await dashboard.page.get_by_text("Read the same elsewhere").click()
    line = await dashboard.page.locator("#curl").inner_text()
    command = shlex.split(line.replace("-N", "-sN"))
    [seq] = database.insert(1, val="spam", uri="at://did:plc:bbb/x/y")
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while (text := await process.stdout.readline()) and text != b"id: %d\n" % seq:
            pass
        assert text
        process.terminate()
        await process.communicate()


@pytest.mark.parametrize(
    ("first", "values"),
    [("import { LabelStream }", {"spam"}), ("const source = new EventSource", {"spam", "rude"})],
)
async def test_page_of_another_origin_reads_by_the_readmes_lines(
    server: Server, database: TestDatabase, context: BrowserContext, first: str, values: set[str]
) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    [script] = re.findall(rf"```js\n({re.escape(first)}.*?)```", readme, re.DOTALL)
    script = script.replace("http://127.0.0.1:8080", server.url)

    async def page_elsewhere(request: web.Request) -> web.Response:
        return web.Response(
            text=f"<!doctype html><body></body><script type=module>{script}</script>",
            content_type="text/html",
        )

    elsewhere = web.Application()
    elsewhere.router.add_get("/", page_elsewhere)
    runner = web.AppRunner(elsewhere)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        database.fill(9)
        page = await context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        await page.goto(f"http://127.0.0.1:{port}/")
        await until(lambda: server.app.metrics.gauges["streams"]() == 1)
        # It starts from now, the first time.
        wanted = []
        for val in ("spam", "rude", "spam"):
            [seq] = database.insert(1, val=val, uri=f"did:web:{val}.example")
            if val in values:
                wanted.append(f"{seq} {val} did:web:{val}.example")
        await until(lambda: wanted[-1] in said)
        assert [text for text in said if " did:web:" in text] == wanted
        await page.close()
    finally:
        await runner.cleanup()
