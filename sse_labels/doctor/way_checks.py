"""Checks of the way from the server to a reader: what do proxies do to the stream?

Promises: a finding names the proxy that causes it, if the proxy names itself, and the proxy's
setting that corrects it. No check waits longer than the server's heartbeat and a few seconds.
Nothing is stored, unless a source to publish as is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

from sse_labels.client.answers import words_in
from sse_labels.client.event_stream import is_event_stream
from sse_labels.client.retries import TOKEN_HINT
from sse_labels.database.schema import Schema
from sse_labels.doctor import stream_probe
from sse_labels.doctor.database_checks import clock_finding
from sse_labels.doctor.findings import (
    Checks,
    Finding,
    Findings,
    Target,
    failure,
    ok,
    problems,
    unchecked,
    warning,
)
from sse_labels.doctor.proxies import Proxy, proxy_of
from sse_labels.doctor.stream_probe import VALUE, StreamProbe
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable
from sse_labels.feed.store import Store
from sse_labels.protocol.label import parse_label
from sse_labels.publishing.label_table import LabelTable

#: How late a heartbeat may be.
LATE_SECONDS = 3.0
#: How long a label may take from the table to the stream; usually milliseconds.
LABEL_SECONDS = 5.0


class WayChecks:
    """Checks one address as a reader of it."""

    def __init__(self, target: Target, url: str) -> None:
        self._target = target
        self._url = url
        #: The table that the server should stream.
        self._store: Store | None = None
        if target.database is not None:
            self._store = Store(target.database, Schema(target.database))
        #: The proxy before the server, as far as `_address` could see one.
        self._proxy = Proxy()

    def checks(self) -> Checks:
        """Return all checks, by subject."""
        return {
            "address": self._address,
            "protocol": self._protocol,
            "stream": self._stream,
            "resuming": self._resuming,
            "same database": self._same_database,
            "a label's way": self._label,
            "restricted paths": self._restricted,
        }

    async def _address(self) -> Findings:
        """Check which program answers, whether the server is ready, and its clock."""
        async with self._client() as client:
            before = time.time()
            response = await client.get("/health/ready")
            after = time.time()
        proxy = proxy_of(response.headers)
        through = f" through {proxy.name}" if proxy else ""
        self._proxy = proxy or self._proxy
        status = response.status_code
        if status == 503:
            found = [failure(f"the server says{through}: {_said(response)}", "see its log")]
        elif status != 200 or "json" not in response.headers.get("content-type", ""):
            seen = f"/health/ready answers {status}{through}, not as sse-labels would"
            do = "give the address under which /stream is; let the proxy pass /health on"
            found = [failure(seen, do)]
        else:
            found = [ok(f"a server answers{through} ({1000 * (after - before):.0f} ms)")]
        if date := response.headers.get("date"):
            # The header has whole seconds, rounded down.
            theirs = parsedate_to_datetime(date).timestamp() + 0.5
            precision = 0.5 + (after - before) / 2
            found.append(clock_finding(theirs - (before + after) / 2, precision, "server's clock"))
        return found

    async def _protocol(self) -> Findings:
        """Check which version of HTTP a browser would use."""
        parts = urlsplit(self._url)
        if parts.scheme == "http":
            if self._is_local():
                return unchecked("HTTP/1.1 without TLS, on this machine alone")
            return warning(
                "no TLS: others on the way can read and forge the stream, and browsers open only "
                "six connections to a host over HTTP/1.1",
                "serve it by https with HTTP/2, as nginx/sse_labels.conf does",
            )
        # httpx sets the protocols anew for each of its own connections.
        self._target.tls.set_alpn_protocols(["h2", "http/1.1"])
        async with asyncio.timeout(stream_probe.FIRST_SECONDS):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or 443, ssl=self._target.tls
            )
        tls = writer.get_extra_info("ssl_object")
        writer.close()
        if tls.selected_alpn_protocol() == "h2":
            return ok(f"HTTP/2, {tls.version()}")
        return warning(
            "HTTP/1.1: browsers open only six connections to a host; the seventh tab hangs",
            "switch HTTP/2 on (nginx: `listen 443 ssl http2`)",
        )

    async def _stream(self) -> Findings:
        """Check that the first bytes and a heartbeat arrive when they are sent."""
        began = time.monotonic()
        try:
            async with self._stream_probe() as probe:
                response = probe.response
                if response.status_code != 200:
                    do = TOKEN_HINT if response.status_code == 401 else "see the message"
                    return failure(f"{response.status_code}: {_said(response)}", do)
                return [*self._head(response.headers), *await self._body(probe, began)]
        except TimeoutError:
            return failure(
                f"no answer within {stream_probe.FIRST_SECONDS:g} s, where the server sends it at "
                f"once: {self._proxy.name} buffers the stream",
                self._proxy.unbuffered,
            )

    def _head(self, headers: httpx.Headers) -> list[Finding]:
        kind = headers.get("content-type", "")
        coding = headers.get("content-encoding")
        return problems(
            not is_event_stream(kind)
            and failure(f"its type is {kind!r}, no event stream", "give its address"),
            coding
            and warning(
                f"{self._proxy.name} compresses it ({coding}), against no-transform: "
                "a compressor may buffer, and needs memory for each reader",
                self._proxy.uncompressed,
            ),
            "no-transform" not in headers.get("cache-control", "")
            and warning(
                "Cache-Control is not what the server sends (no-cache, no-transform): caches "
                "on the way may store the stream",
                "let the proxy leave Cache-Control unchanged",
            ),
        )

    async def _body(self, probe: StreamProbe, began: float) -> list[Finding]:
        """Return findings about the opening of the stream, and about a heartbeat after silence."""
        opened = await probe.opened()
        if opened is None:
            return [self._missing(probe, "its first bytes, sent at once, did not come")]
        first = ok(f"first bytes after {1000 * (time.monotonic() - began):.0f} ms")
        heartbeat = float(opened["heartbeatSeconds"])
        silent = time.monotonic()
        came = await probe.first("", heartbeat + LATE_SECONDS)
        silence = time.monotonic() - silent
        if came is not None:
            return [first, ok(f"a heartbeat after {silence:.1f} s of silence")]
        if probe.ended and not probe.error:
            end = failure(
                f"{self._proxy.name} ends it after {silence:.1f} s of silence; the heartbeat comes "
                f"after {heartbeat:g} s",
                f"{self._proxy.lasting}, or serve with --heartbeat-seconds below its limit",
            )
            return [first, end]
        return [first, self._missing(probe, f"no heartbeat came within {silence:.0f} s")]

    def _missing(self, probe: StreamProbe, seen: str) -> Finding:
        if probe.error:
            return failure(f"the server ends it: {probe.error}", "see its log and its limits")
        buffers = f"{self._proxy.name} buffers the stream"
        how = "the connection ended first" if probe.ended else buffers
        return failure(f"{seen}: {how}", self._proxy.unbuffered)

    async def _resuming(self) -> Findings:
        """Check that a cursor reaches the server, in the header and in the query.

        The check sends a cursor that every server refuses. 400 means that it has arrived.
        """
        ways: dict[str, dict[str, Any]] = {
            "the header Last-Event-ID": {"headers": {"Last-Event-ID": VALUE}},
            "the query (?cursor=)": {"params": {"cursor": VALUE}},
        }
        lost = []
        async with self._client() as client:
            for way, more in ways.items():
                async with client.stream("GET", "/stream", **more) as response:
                    if response.status_code == 200:
                        lost.append(way)
                    elif response.status_code != 400:
                        await response.aread()
                        return unchecked(
                            f"the stream answers {response.status_code}: {_said(response)}"
                        )
        if lost:
            return failure(
                f"{' and '.join(lost)} does not reach the server: readers that reconnect miss "
                "labels",
                "let the proxy pass it on",
            )
        return ok("Last-Event-ID and ?cursor= reach the server")

    async def _same_database(self) -> Findings:
        """Check that the server at the address streams the database that --dsn names."""
        if self._store is None:
            return unchecked("no database is known here", "give --dsn")
        await self._store.schema.check()
        newest = await self._store.newest()
        epoch = (await self._store.state()).epoch
        deadline = time.monotonic() + LABEL_SECONDS
        while True:
            async with self._stream_probe() as probe:
                opened = await probe.opened()
            if opened is None:
                return unchecked("the stream does not open")
            if epoch is not None and opened["epoch"] != epoch:
                return failure(
                    f"the server's epoch is {opened['epoch']}, the database's {epoch}: the server "
                    "has another database, or must be restarted after a restore",
                    "check the address and --dsn, then restart the server",
                )
            head = int(opened["head"])
            if head >= newest:
                return ok(f"epoch {epoch}, head {head}")
            if time.monotonic() > deadline:
                return failure(
                    f"the server's head is {head}, and stayed {newest - head} below the newest seq",
                    "see `open transactions` above, and the server's log",
                )
            await asyncio.sleep(0.2)

    async def _label(self) -> Findings:
        """Publish a label and its negation; report how long each took to arrive."""
        source = self._target.publish_as
        if source is None:
            do = "give --publish-as DID: it stores a label of that source, and its negation"
            return unchecked("nothing is published without --publish-as", do)
        if self._store is None:
            return unchecked("no database is known here", "give --dsn")
        await self._store.schema.check()
        table = LabelTable(self._store.database)
        took = []
        async with self._stream_probe() as probe:
            if await probe.opened() is None:
                return unchecked("the stream does not open")
            for more in ({}, {"neg": True}):
                now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
                label = {"src": source, "uri": source, "val": VALUE, "cts": now, **more}
                began = time.monotonic()
                try:
                    seqs = await table.insert([parse_label(label)], None, b"")
                except (DatabaseUnavailable, DatabaseRefused) as error:
                    return unchecked(f"publishing failed: {error}")
                assert seqs is not None  # noqa: S101 - without a key it always stores
                if await probe.first(f'"seq":{seqs[0]},', LABEL_SECONDS) is None:
                    return failure(
                        f"seq {seqs[0]} was stored and did not arrive within {LABEL_SECONDS:g} s",
                        "see the findings above; the label is stored",
                    )
                took.append(f"{1000 * (time.monotonic() - began):.0f} ms")
        return ok(f"a label took {took[0]} from before its INSERT, its negation {took[1]}")

    async def _restricted(self) -> Findings:
        """Check whether metrics and publishing can be reached from here."""
        async with self._client() as client:
            metrics = await client.get("/metrics")
            # Without a token the server answers 401. A proxy that forbids it answers 403.
            publish = await client.post(
                "/labels", json={"labels": []}, headers={"Authorization": ""}
            )
        return restricted_finding(
            metrics.status_code == 200, publish.status_code == 401, self._is_local()
        )

    def _is_local(self) -> bool:
        """Return whether the address names this machine itself."""
        host = urlsplit(self._url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    def _client(self) -> httpx.AsyncClient:
        token = self._target.token
        return httpx.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(stream_probe.FIRST_SECONDS),
            follow_redirects=True,
            verify=self._target.tls,
        )

    @asynccontextmanager
    async def _stream_probe(self) -> AsyncIterator[StreamProbe]:
        async with self._client() as client, stream_probe.opened(client) as probe:
            yield probe


def restricted_finding(metrics_open: bool, publish_open: bool, local: bool) -> Finding:
    """Return the finding about paths that not everybody should reach."""
    names = {"/metrics": metrics_open, "publishing": publish_open}
    reachable = [name for name, is_open in names.items() if is_open]
    if not reachable:
        return ok("metrics and publishing are closed to readers here")
    seen = f"{' and '.join(reachable)} can be reached from here"
    if local:
        return unchecked(f"{seen}, the server's own machine", "run it on another machine, too")
    return warning(seen, "allow the addresses that need it, as nginx/sse_labels.conf does")


def _said(response: httpx.Response) -> str:
    """Return the server's message, or the name of the status."""
    return words_in(response.text, response.reason_phrase or "no reason given")
