"""The doctor and the way to a reader: what a proxy does wrong is found, and the proxy named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sse_labels.cli.place import database_at
from sse_labels.cli.tls import any_certificate
from sse_labels.config import Settings
from sse_labels.doctor import Finding, Target, Verdict, database_checks, examine, stream_probe
from sse_labels.doctor import way_checks as way
from sse_labels.doctor.proxies import proxy_of

from support.database import TestDatabase, until
from support.nginx import Nginx, nginx
from support.server import RunServer

DID = "did:web:labeler.example"
#: The heartbeat of the servers here, in seconds; the doctor waits for one.
HEARTBEAT = 0.4

Front = Callable[..., AbstractAsyncContextManager[Nginx]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come is not waited for so long."""
    monkeypatch.setattr(stream_probe, "FIRST_SECONDS", 2.0)
    monkeypatch.setattr(way, "LATE_SECONDS", 1.0)
    monkeypatch.setattr(database_checks, "HOLD_SECONDS", 0.05)


@pytest.fixture
def front(run_server: RunServer) -> Front:
    """A server, and nginx before it, with mistakes in its site."""

    @asynccontextmanager
    async def start(faults: dict[str, str] | None = None, **settings: Any) -> Any:
        async with run_server(**{"heartbeat_seconds": HEARTBEAT, **settings}) as server:
            with nginx(int(server.url.rpartition(":")[2]), faults=faults) as proxy:
                async with aiohttp.ClientSession() as session:

                    async def answers() -> bool:
                        try:
                            async with session.get(proxy.url + "/health/live") as response:
                                return response.status == 200
                        except aiohttp.ClientConnectorError:
                            return False

                    await until(answers)
                yield proxy

    return start


async def look(url: str | None, dsn: str | None = None, **more: Any) -> list[Finding]:
    """What is found at an address; the database's own findings are left out."""
    database = None if dsn is None else database_at(Settings(), dsn)
    target = Target(Settings(), database, embedded=True, url=url, **more)
    findings = [finding async for finding in examine(target)]
    if database is not None:
        database.close()
    first = next(place for place, finding in enumerate(findings) if finding.subject == "address")
    return findings[first:]


def of(findings: list[Finding], subject: str) -> list[Finding]:
    """The findings of one subject."""
    found = [finding for finding in findings if finding.subject == subject]
    assert found, findings
    return found


def failure_of(findings: list[Finding], subject: str) -> Finding:
    """The one failure, which is of this subject."""
    [found] = [finding for finding in findings if finding.verdict is Verdict.FAILURE]
    assert found.subject == subject
    return found


async def test_the_site_that_operators_are_given_has_no_finding_but_ok(
    front: Front, database: TestDatabase
) -> None:
    database.insert(3)
    closed = {"allow 127.0.0.1;\n": "\n"}
    async with front(closed) as proxy:
        url = f"https://localhost:{proxy.tls_port}"
        findings = await look(url, database.dsn, tls=any_certificate(), publish_as=DID)
    assert {finding.verdict for finding in findings} == {Verdict.OK}, findings
    words = "\n".join(finding.seen for finding in findings)
    assert "a server answers through nginx" in words
    assert "HTTP/2, TLSv1.3" in words
    assert "a heartbeat after 0." in words
    assert "head 3" in words
    assert "metrics and publishing are closed" in words
    stored = [event["labels"][0] for event in database.stored(after=3)]
    assert [(label["src"], label["val"], label.get("neg")) for label in stored] == [
        (DID, "sse-labels-doctor", None),
        (DID, "sse-labels-doctor", True),
    ]


async def test_nothing_is_published_unasked(front: Front, database: TestDatabase) -> None:
    async with front() as proxy:
        findings = await look(proxy.url, database.dsn)
    assert of(findings, "a label's way")[0].verdict is Verdict.UNCHECKED
    assert "--publish-as" in of(findings, "a label's way")[0].do
    assert database.stored() == []


DEAF = {"proxy_buffering off;": "proxy_ignore_headers X-Accel-Buffering;"}
#: As a bare `proxy_pass` would.
OLD_HTTP = {"proxy_http_version 1.1;": ""}
GZIP = {"gzip off;": "gzip on; gzip_types text/event-stream; gzip_proxied any;"}
PROXIES = {
    "gathers": (
        {**DEAF, **OLD_HTTP}, "stream", Verdict.FAILURE,
        "sends it at once: nginx buffers the stream", "proxy_buffering off",
    ),
    "gathers to compress": (
        {**DEAF, **GZIP}, "stream", Verdict.FAILURE,
        "sends it at once: nginx buffers the stream", "proxy_buffering off",
    ),
    "compresses": (GZIP, "stream", Verdict.WARNING, "nginx compresses it (gzip)", "gzip off"),
    "cuts a silent stream": (
        {"proxy_read_timeout 60s;": "proxy_read_timeout 1s;"}, "stream", Verdict.FAILURE,
        "of silence; the heartbeat comes after 5 s", "proxy_read_timeout 60s",
    ),
    "drops the cursor": (
        {"proxy_buffering off;": 'proxy_buffering off; proxy_set_header Last-Event-ID "";'},
        "resuming", Verdict.FAILURE, "the header Last-Event-ID does not reach the server", "pass",
    ),
}  # fmt: skip


class TestAProxy:
    @pytest.mark.parametrize("name", PROXIES)
    async def test_that_is_set_up_wrongly_is_named_with_what_corrects_it(
        self, front: Front, name: str
    ) -> None:
        faults, subject, verdict, seen, do = PROXIES[name]
        settings = {"heartbeat_seconds": 5.0} if "silent" in name else {}
        async with front(faults, **settings) as proxy:
            findings = await look(proxy.url)
        bad = (Verdict.WARNING, Verdict.FAILURE)
        [found] = [finding for finding in findings if finding.verdict in bad]
        assert (found.subject, found.verdict) == (subject, verdict)
        assert seen in found.seen
        assert do in found.do

    async def test_that_drops_the_query_is_found(self, front: Front) -> None:
        faults = {
            "location = /stream {\n        proxy_pass http://sse_labels;":
            "location = /stream {\n        set $args \"\";\n        proxy_pass http://sse_labels;"
        }  # fmt: skip
        async with front(faults) as proxy:
            findings = await look(proxy.url)
        assert "the query (?cursor=) does not reach" in of(findings, "resuming")[0].seen

    async def test_whose_server_is_away_is_told_from_one_that_is_not_there(
        self, front: Front
    ) -> None:
        async with front() as proxy:
            url = proxy.url
            faults = {"proxy_pass http://sse_labels;": "proxy_pass http://127.0.0.1:1;"}
            with nginx(1, faults=faults) as other:
                await until(lambda: reachable(other.url))
                broken = await look(other.url)
        assert "/health/ready answers 502 through nginx" in broken[0].seen
        nobody = await look(url)
        assert nobody[0].verdict is Verdict.FAILURE
        assert nobody[1].verdict is Verdict.UNCHECKED

    async def test_with_a_certificate_that_nobody_trusts_is_found(self, front: Front) -> None:
        async with front() as proxy:
            findings = await look(f"https://localhost:{proxy.tls_port}")
        assert "CERTIFICATE_VERIFY_FAILED" in findings[0].seen

    async def test_without_http_2_is_a_warning(self, front: Front) -> None:
        async with front({" ssl http2;": " ssl;"}) as proxy:
            findings = await look(f"https://localhost:{proxy.tls_port}", tls=any_certificate())
        [found] = of(findings, "protocol")
        assert found.verdict is Verdict.WARNING
        assert "six connections" in found.seen


class TestTheServer:
    async def test_that_is_protected_asks_for_a_token(self, run_server: RunServer) -> None:
        async with run_server(jwt_secret="0123456789abcdef0123456789abcdef") as server:
            found = failure_of(await look(server.url), "stream")
        assert "401: AuthRequired" in found.seen
        assert "--token, or SSE_LABELS_TOKEN" in found.do

    async def test_that_is_full_is_named_and_no_proxy_blamed(self, front: Front) -> None:
        async with (
            front(max_streams=1) as proxy,
            aiohttp.ClientSession() as session,
            session.get(f"{proxy.url}/stream") as stream,
        ):
            await stream.content.readline()
            found = failure_of(await look(proxy.url), "stream")
        assert "the server ends it: TooManyConnections: " in found.seen
        assert "proxy" not in found.seen + found.do

    async def test_on_another_database_is_found(self, front: Front, database: TestDatabase) -> None:
        async with front() as proxy:
            database.execute("UPDATE label_stream SET epoch = gen_random_uuid()")
            found = failure_of(await look(proxy.url, database.dsn), "same database")
        assert "the server's epoch is" in found.seen

    async def test_whose_head_stays_behind_is_found(
        self, front: Front, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(way, "LABEL_SECONDS", 0.5)
        async with front() as proxy:
            writer = database.connect(autocommit=False)
            with writer.cursor() as cursor:
                cursor.execute("SELECT nextval('label_id_seq')")
            database.insert(2)
            found = failure_of(
                await look(proxy.url, database.dsn, publish_as=None), "same database"
            )
            writer.rollback()
        assert "the server's head is 0, and stayed 3 below the newest seq" in found.seen

    async def test_whose_labels_do_not_arrive_is_found(
        self, front: Front, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(way, "LABEL_SECONDS", 0.5)
        async with front() as proxy:
            writer = database.connect(autocommit=False)
            with writer.cursor() as cursor:
                cursor.execute("SELECT nextval('label_id_seq')")
            findings = await look(proxy.url, database.dsn, publish_as=DID)
            writer.rollback()
        [found] = of(findings, "a label's way")
        assert found.verdict is Verdict.FAILURE
        assert "seq 2 was stored and did not arrive" in found.seen

    async def test_that_is_another_program_is_found(self) -> None:
        async with other_program() as url:
            findings = await look(url)
        assert findings[0].verdict is Verdict.FAILURE
        assert "/health/ready answers 404" in findings[0].seen
        assert "not as sse-labels would" in findings[0].seen


async def test_answers_that_nobody_expects_are_no_traceback() -> None:
    async def anything(request: web.Request) -> web.Response:
        headers = {"Content-Type": "application/json", "Date": "Tue, 24 Nov 2026 12:00:00 GMT"}
        return web.Response(body=b'event: info\ndata: {"x":"StreamOpened"}\n\n', headers=headers)

    async with other_program(("/health/ready", anything), ("/stream", anything)) as url:
        findings = await look(url)
    assert "not one of sse-labels" in of(findings, "stream")[-1].seen
    assert of(findings, "stream")[-1].verdict is Verdict.UNCHECKED

    async def undated(request: web.Request) -> web.Response:
        headers = {"Content-Type": "application/json", "Date": "yesterday"}
        return web.Response(body=b"[]", headers=headers)

    async with other_program(("/health/ready", undated)) as url:
        findings = await look(url)
    assert findings[0].verdict is Verdict.FAILURE
    assert "not one of sse-labels" in findings[0].seen


async def test_a_stream_whose_head_comes_alone_is_found() -> None:
    """A proxy that passes the head on and gathers the body; nginx holds both back."""

    async def headed(request: web.Request) -> web.StreamResponse:
        if not {"cursor", "Last-Event-ID"}.isdisjoint([*request.query, *request.headers]):
            return web.Response(status=400)
        answer = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-transform"}
        )
        await answer.prepare(request)
        # Nothing of the body comes before the client leaves.
        await asyncio.Event().wait()
        return answer

    async def ready(request: web.Request) -> web.Response:
        return web.json_response({"status": "ready", "head": 0})

    async with other_program(("/health/ready", ready), ("/stream", headed)) as url:
        found = failure_of(await look(url), "stream")
    assert "its first bytes, sent at once, did not come" in found.seen


@pytest.mark.parametrize(
    ("metrics", "publish", "local", "verdict", "words"),
    [
        (False, False, False, Verdict.OK, "closed"),
        (True, False, False, Verdict.WARNING, "/metrics can be reached"),
        (False, True, False, Verdict.WARNING, "publishing can be reached"),
        (True, True, True, Verdict.UNCHECKED, "/metrics and publishing can be reached"),
    ],
)
def test_doors_are_judged_by_who_knocks(
    metrics: bool, publish: bool, local: bool, verdict: Verdict, words: str
) -> None:
    finding = way.restricted_finding(metrics, publish, local)
    assert finding.verdict is verdict
    assert words in finding.seen


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"server": "sse_labels"}, None),
        ({}, None),
        ({"server": "nginx/1.22.1"}, "nginx"),
        ({"server": "Apache/2.4.57 (Debian)"}, "Apache"),
        ({"server": "sse_labels", "via": "1.1 Caddy"}, "Caddy"),
        ({"server": "sse_labels", "via": "1.1 varnish"}, "a proxy that calls itself 1.1 varnish"),
        ({"server": "cloudflare"}, "a proxy that calls itself cloudflare"),
    ],
)
def test_a_proxy_is_known_by_its_headers(headers: dict[str, str], name: str | None) -> None:
    proxy = proxy_of(headers)
    assert (proxy and proxy.name) == name


async def reachable(url: str) -> bool:
    """Whether anything answers there."""
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(url):
                return True
        except aiohttp.ClientConnectorError:
            return False


@asynccontextmanager
async def other_program(*routes: tuple[str, Any]) -> AsyncIterator[str]:
    """An HTTP server that is not ours."""
    app = web.Application()
    for path, handler in routes:
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
