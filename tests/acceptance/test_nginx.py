"""Real nginx with exactly the site file that operators are given."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from ipaddress import ip_network
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import pytest
from oracle import tell
from oracle.behind_nginx import Behind, behind_nginx
from oracle.databases import own_postgres
from yarl import URL

from sse_labels.config import Settings
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.protocol.xrpc import SUBSCRIBE_PATH, decode

from support.database import TestDatabase, until
from support.eventsource import parse
from support.nginx import Nginx, nginx
from support.program import QUICK_SERVER, REPOSITORY, free_port, ran, running
from support.reading import reading
from support.server import PUBLISH_TOKEN, RunServer
from support.system import program

#: A buffer would hold an event back until a heartbeat fills it, many times 15 s.
PROMPT_SECONDS = 2.0
STREAMS = 1000
#: Whose latency is measured, on each way.
EVENTS = 100
#: Of one address, in the site file.
STREAMS_PER_ADDRESS = 200


def client(source: str = "127.0.0.1") -> aiohttp.ClientSession:
    """A client with an address of its own: all of 127.0.0.0/8 is this machine."""
    connector = aiohttp.TCPConnector(local_addr=(source, 0), limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(30))


@pytest.fixture
def front(run_server: RunServer) -> Any:
    """A server, and nginx in front of it."""

    @asynccontextmanager
    async def start(**settings: Any) -> Any:
        async with run_server(**settings) as server:
            with nginx(int(server.url.rpartition(":")[2])) as proxy:
                async with client() as session:
                    await until(lambda: answers(session, proxy))
                yield server, proxy

    return start


async def answers(session: aiohttp.ClientSession, proxy: Nginx) -> bool:
    try:
        async with session.get(f"{proxy.url}/health/live") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_site_is_accepted_without_a_warning(front: Any) -> None:
    async with front() as (_, proxy):
        assert "[warn]" not in proxy.check()


async def test_first_byte_and_each_event_leave_at_once(
    front: Any, database: TestDatabase, request: pytest.FixtureRequest
) -> None:
    async with front() as (server, proxy):
        times: dict[str, list[float]] = {}
        for name, url in (("direct", server.url), ("nginx", proxy.url)):
            begun = time.monotonic()
            async with reading(f"{url}/stream") as reader:
                await reader.until_opened()
                times[f"first {name}"] = [time.monotonic() - begun]
                for _ in range(EVENTS):
                    published = time.monotonic()
                    # The next one is published when this one has come: a block would never fill.
                    [seq] = await asyncio.to_thread(database.insert)
                    await reader.until_seq(seq)
                    times.setdefault(name, []).append(time.monotonic() - published)
        tell(
            request.config,
            "; ".join(
                f"{name}: p50 {1000 * median(times[name]):.1f} ms, "
                f"p99 {1000 * quantiles(times[name], n=100)[98]:.1f} ms"
                for name in ("direct", "nginx")
            ),
        )
        for name, seconds in times.items():
            assert median(seconds) < PROMPT_SECONDS, (name, times)


async def test_stream_resumes_through_nginx(front: Any, database: TestDatabase) -> None:
    database.fill(30)
    async with front() as (_, proxy):
        async with reading(f"{proxy.url}/stream", last_event_id="12") as reader:
            await reader.until_seq(30)
        assert reader.events == database.stored(12)
        assert reader.response.headers["Content-Type"].startswith("text/event-stream")
        assert "Content-Encoding" not in reader.response.headers


async def test_stream_comes_over_tls_and_http_2(front: Any, database: TestDatabase) -> None:
    database.fill(3)
    async with front() as (_, proxy):
        process = await asyncio.create_subprocess_exec(
            *(program("curl"), "-skN", "--http2", "--compressed", "-D", "-"),
            f"https://127.0.0.1:{proxy.tls_port}/stream?cursor=0",
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        lines = []
        async with asyncio.timeout(20):
            while b"id: 3\n" not in lines:
                line = await process.stdout.readline()
                assert line, lines
                lines.append(line)
        process.kill()
        await process.communicate()
        assert lines[0] == b"HTTP/2 200 \r\n"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/labels"),
        ("GET", "/metrics"),
        ("GET", "/streams"),
        ("DELETE", "/streams/any"),
    ],
)
async def test_what_is_not_for_the_world_is_closed_to_it(
    method: str, path: str, front: Any
) -> None:
    headers = {"Authorization": f"Bearer {PUBLISH_TOKEN}"}
    async with front() as (_, proxy):
        async with (
            client("127.0.0.2") as session,
            session.request(method, proxy.url + path, headers=headers) as response,
        ):
            assert response.status == 403
            # nginx's own page: the server was not asked.
            assert b"<center>nginx" in await response.read()
        async with (
            client() as session,
            session.request(method, proxy.url + path, headers=headers) as response,
        ):
            assert b"<center>nginx" not in await response.read()


async def test_readers_address_is_handed_on_and_cannot_be_forged(front: Any) -> None:
    async with front(trusted_proxies=(ip_network("127.0.0.1/32"),)) as (server, proxy):
        headers = {"X-Forwarded-For": "203.0.113.9"}
        async with (
            client("127.0.0.7") as session,
            session.get(f"{proxy.url}/stream", headers=headers) as response,
        ):
            assert response.status == 200
            [visit] = server.app.site.streams.open.values()
            assert visit.client == "127.0.0.7"


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process and its children open what a thousand streams take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def read_until(session: aiohttp.ClientSession, url: str, last: int) -> list[Any]:
    """Read a stream from its start; return the events."""
    events = []
    async with session.get(f"{url}/stream?cursor=0") as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b'data: {"seq"'):
                events.append(json.loads(line[6:]))
                if events[-1]["seq"] == last:
                    return events
    raise AssertionError("the stream ended")


async def test_thousand_streams_get_the_whole_table(database: TestDatabase) -> None:
    database.fill(5)
    with (
        many_files(),
        running("serve", *QUICK_SERVER, "--dsn", database.dsn) as served,
        nginx(int(served.url().rpartition(":")[2])) as proxy,
    ):
        async with AsyncExitStack() as stack:
            sessions = [
                await stack.enter_async_context(client(f"127.0.0.{2 + each}"))
                for each in range(STREAMS // STREAMS_PER_ADDRESS)
            ]
            await until(lambda: answers(sessions[0], proxy))
            reads = [
                asyncio.create_task(read_until(sessions[each % len(sessions)], proxy.url, 10))
                for each in range(STREAMS)
            ]
            local = await stack.enter_async_context(client())

            async def all_are_open() -> bool:
                async with local.get(f"{proxy.url}/metrics") as response:
                    return f"sse_labels_streams {STREAMS}.0" in await response.text()

            await until(all_are_open, 60)
            # One more of an address that has its share.
            async with sessions[0].get(f"{proxy.url}/stream") as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "30")
                assert json.loads(await response.text())["error"] == "TooManyFromAddress"
            headers = {"Accept": "text/event-stream", "Last-Event-ID": "7"}
            async with sessions[0].get(f"{proxy.url}/stream", headers=headers) as response:
                assert (response.status, response.content_type) == (200, "text/event-stream")
                said = parse(await response.read())
            assert [json.loads(event.data)["error"] for event in said.events] == [
                "TooManyFromAddress"
            ]
            assert said.last_event_id == "7"
            assert said.retry_ms in {20_000, 30_000, 40_000, 50_000}
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await sessions[0].ws_connect(f"{proxy.url}{SUBSCRIBE_PATH}")
            await asyncio.to_thread(database.insert, 5)
            stored = database.stored()
            async with asyncio.timeout(60):
                for read in reads:
                    assert await read == stored


#: An EventSource, and clients that do not say what they take.
ACCEPTS = {"EventSource": {"Accept": "text/event-stream"}, "any": {}}


def told_to_come_back(answer: aiohttp.ClientResponse, body: str, *, event_source: bool) -> None:
    """No server answered, and the reader is told so in a way that it does not take for final."""
    if event_source:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        said = parse(body.encode())
        assert said.retry_ms in {2000, 3000, 4000, 5000}
        [event] = said.events
        assert event.event == "error"
        assert json.loads(event.data)["error"] == "NotReady"
    else:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert json.loads(body)["error"] == "NotReady"


@pytest.mark.parametrize("who", ACCEPTS)
@pytest.mark.parametrize("servers", [1, 2])
async def test_every_reader_is_told_to_come_back_while_no_server_listens(
    who: str, servers: int
) -> None:
    with nginx(*(free_port() for _ in range(servers))) as proxy:
        async with client() as session:
            # After the first request nginx has counted both servers out, and asks none.
            for path in ["/stream", "/xrpc/com.atproto.label.subscribeLabels"] * 4:
                async with session.get(proxy.url + path, headers=ACCEPTS[who]) as answer:
                    text = await answer.text()
                    told_to_come_back(answer, text, event_source=who == "EventSource")
        # A server that is the only one is never counted out.
        assert ("no live upstreams" in proxy.errors()) == (servers > 1)


@pytest.mark.parametrize("who", ACCEPTS)
@pytest.mark.parametrize("behaviour", ["closes", "says nothing", "says nonsense"])
async def test_every_reader_is_told_to_come_back_when_a_server_gives_no_answer(
    who: str, behaviour: str
) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if behaviour == "says nothing":
            await ended.wait()
        elif behaviour == "says nonsense":
            writer.write(b"HTTP/1.1 200 OK\r\nwhat is this\x00\r\n\r\n")
        writer.close()

    ended = asyncio.Event()
    quick = {"proxy_read_timeout 60s": "proxy_read_timeout 100ms"}
    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        with nginx(server.sockets[0].getsockname()[1], faults=quick) as proxy:
            async with client() as session:
                url = f"{proxy.url}/stream?cursor=3"
                async with session.get(url, headers=ACCEPTS[who]) as answer:
                    text = await answer.text()
                    told_to_come_back(answer, text, event_source=who == "EventSource")
        ended.set()


@pytest.mark.parametrize(
    ("header", "query", "position"),
    [
        ("41", "", "41"),
        (None, "lastEventId=42", "42"),
        (None, "values=spam&cursor=0", "0"),
        # As the server reads them: what a client comes back with is newer than its URL.
        ("41", "lastEventId=42&cursor=43", "41"),
        (None, "cursor=43&lastEventId=42", "42"),
        (str(2**63 - 1), "", str(2**63 - 1)),
        # The reader has no position, or one that no server would take.
        (None, "", None),
        ("", "", None),
        ("4x", "cursor=43", None),
        ("-1", "", None),
        ("4 2", "", None),
        ("9" * 20, "", None),
        (None, "cursor=4%0Adata:%20x", None),
        (None, "lastEventId=4%0D", None),
    ],
)
async def test_reader_keeps_its_position_while_no_server_answers(
    dead_end: Nginx, header: str | None, query: str, position: str | None
) -> None:
    headers = {"Accept": "text/event-stream"}
    if header is not None:
        headers["Last-Event-ID"] = header
    async with client() as session:
        url = URL(f"{dead_end.url}/stream?{query}", encoded=True)
        async with session.get(url, headers=headers) as answer:
            text = await answer.text()
    told_to_come_back(answer, text, event_source=True)
    assert [line for line in text.splitlines() if line.startswith("id:")] == (
        [] if position is None else [f"id: {position}"]
    )


@pytest.fixture(scope="module")
def dead_end() -> Iterator[Nginx]:
    """nginx without a server."""
    with nginx(free_port()) as proxy:
        yield proxy


@pytest.mark.parametrize("path", ["/xrpc/com.atproto.label.subscribeLabels?cursor=0", "/stream"])
async def test_websocket_handshake_is_broken_off_while_no_server_answers(
    dead_end: Nginx, path: str
) -> None:
    async with client() as session:
        # An answer of any status would be a WSServerHandshakeError, and final for many clients.
        with pytest.raises(aiohttp.ServerDisconnectedError):
            async with session.ws_connect(dead_end.url + path):
                pass


@pytest.fixture(scope="module")
def postgres_of_faults() -> Iterator[EmbeddedPostgres]:
    with own_postgres() as postgres:
        yield postgres


async def clean(behind: Behind) -> None:
    """Nothing was lost, doubled, reordered or altered."""
    verdict = await behind.stage.end()
    told = f"{verdict}\n{behind.stage.log()}\n{behind.proxy.errors()[-4000:]}"
    assert verdict.clean, told
    assert verdict.labels > 20


async def test_nothing_is_lost_when_nginx_reloads(postgres_of_faults: EmbeddedPostgres) -> None:
    async with behind_nginx(postgres_of_faults, "nginx") as behind:
        for _ in range(2):
            await behind.stage.inject("nginx reloads", behind.reload)
        await clean(behind)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["drained", "killed"])
async def test_nothing_is_lost_when_one_of_two_servers_is_restarted(
    number: signal.Signals, postgres_of_faults: EmbeddedPostgres
) -> None:
    async with behind_nginx(postgres_of_faults, "nginx") as behind:
        for _ in range(2):
            await behind.stage.inject(
                f"{number.name} of one of two", lambda: behind.restart_server(number)
            )
        await clean(behind)


async def test_nothing_is_lost_when_nginx_restarts(postgres_of_faults: EmbeddedPostgres) -> None:
    async with behind_nginx(postgres_of_faults, "nginx") as behind:
        await behind.stage.inject("nginx restarts", lambda: behind.restart_nginx(signal.SIGTERM))
        await clean(behind)


UNIT = REPOSITORY / "nginx/sse-labels@.service"


def unit_settings() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def test_unit_starts_a_command_that_there_is_and_waits_until_it_has_drained() -> None:
    settings = unit_settings()
    _, *arguments = settings["ExecStart"].replace("%i", "0").split()
    # Its port is taken as it stands; a setting that is wrong is named, and nothing is started.
    refused = ran(*arguments, "--drain-seconds=x")
    assert "drain" in refused.err[-1]
    assert int(settings["TimeoutStopSec"]) > 2 * Settings().drain_seconds
    assert int(settings["LimitNOFILE"]) > 2 * Settings().max_connections


def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    checker = program("systemd-analyze")
    settings = unit_settings()
    # Where this is checked nothing is installed in /opt.
    text = UNIT.read_text().replace(settings["ExecStart"].split()[0], "/bin/true")
    unit = tmp_path / "sse-labels@8080.service"
    unit.write_text(text)
    done = subprocess.run([checker, "verify", str(unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "sse-labels" in line]
    assert (done.returncode, said) == (0, [])


async def test_subscribe_labels_comes_through_by_websocket_and_without_an_upgrade(
    front: Any, database: TestDatabase
) -> None:
    database.fill(5)
    path = "/xrpc/com.atproto.label.subscribeLabels?cursor=2"
    async with front() as (_, proxy):
        async with client() as session, session.ws_connect(proxy.url + path) as socket:
            seqs = [decode(await socket.receive_bytes()).body["seq"] for _ in range(3)]
            [live] = database.insert()
            seqs.append(decode(await socket.receive_bytes()).body["seq"])
        assert seqs == [3, 4, 5, live]
        async with reading(proxy.url + path) as reader:
            assert await reader.until_seq(live) == database.stored(2)
