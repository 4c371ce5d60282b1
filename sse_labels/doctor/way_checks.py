"""Checks of the way to a reader: what a proxy between makes of the stream.

Promises: what is wrong is named with the proxy that does it, if that names itself, and with its
setting that corrects it; nothing waits longer than the server's heartbeat and a few seconds.
Nothing is stored, unless a source to publish as is given.
Does not belong here: the database, but for what the two must agree on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx
import ujson

from sse_labels.client.answers import words_in
from sse_labels.client.event_stream import Block, EventStream, is_event_stream
from sse_labels.client.retries import TOKEN_HINT
from sse_labels.database.schema import Schema
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
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable
from sse_labels.feed.store import Store
from sse_labels.protocol.label import parse_label
from sse_labels.publishing.label_table import LabelTable

#: What the server sends at once must be here by then.
FIRST_SECONDS = 5.0
#: How much later than promised a heartbeat may come.
LATE_SECONDS = 3.0
#: How long a label may take; it takes milliseconds.
LABEL_SECONDS = 5.0
#: The value of the labels that are published here, and a filter that keeps all others away.
VALUE = "sse-labels-doctor"


class WayChecks:
    """Looks at one address, as its readers see it."""

    def __init__(self, target: Target, url: str) -> None:
        self._target = target
        self._url = url
        #: Where the labels should come from.
        self._store: Store | None = None
        if target.database is not None:
            self._store = Store(target.database, Schema(target.database))
        #: Who stands between, as far as `_address` could see.
        self._proxy = Proxy()

    def checks(self) -> Checks:
        """Return all of them."""
        return {
            "address": self._address,
            "protocol": self._protocol,
            "stream": self._stream,
            "resuming": self._resuming,
            "same database": self._same_database,
            "a label's way": self._label,
            "closed doors": self._doors,
        }

    async def _address(self) -> Findings:
        """Say who answers, whether the server behind is ready, and what its clock says."""
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
            # It has whole seconds, rounded down.
            theirs = parsedate_to_datetime(date).timestamp() + 0.5
            precision = 0.5 + (after - before) / 2
            found.append(clock_finding(theirs - (before + after) / 2, precision, "server's clock"))
        return found

    async def _protocol(self) -> Findings:
        """Say what a browser would speak."""
        parts = urlsplit(self._url)
        if parts.scheme == "http":
            if self._is_local():
                return unchecked("HTTP/1.1 without TLS, on this machine alone")
            return warning(
                "no TLS: whoever is between can read and forge, and browsers open only six "
                "connections to a host over HTTP/1.1",
                "serve it by https with HTTP/2, as nginx/sse_labels.conf does",
            )
        # httpx sets its own for each connection.
        self._target.tls.set_alpn_protocols(["h2", "http/1.1"])
        async with asyncio.timeout(FIRST_SECONDS):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or 443, ssl=self._target.tls
            )
        tls = writer.get_extra_info("ssl_object")
        writer.close()
        if tls.selected_alpn_protocol() == "h2":
            return ok(f"HTTP/2, {tls.version()}")
        return warning(
            "HTTP/1.1: browsers open only six connections to a host, and hang at the seventh tab",
            "switch HTTP/2 on (nginx: `listen 443 ssl http2`)",
        )

    async def _stream(self) -> Findings:
        """Say whether bytes come as they are sent: the first ones, and a heartbeat."""
        began = time.monotonic()
        try:
            async with self._reader() as reader:
                response = reader.response
                if response.status_code != 200:
                    do = TOKEN_HINT if response.status_code == 401 else "see the message"
                    return failure(f"{response.status_code}: {_said(response)}", do)
                return [*self._head(response.headers), *await self._body(reader, began)]
        except TimeoutError:
            return failure(
                f"no answer within {FIRST_SECONDS:g} s, where the server sends it at once: "
                f"{self._proxy.name} gathers the stream",
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
                "a compressor may gather, and keeps memory for each reader",
                self._proxy.uncompressed,
            ),
            "no-transform" not in headers.get("cache-control", "")
            and warning(
                "Cache-Control is not what the server sends (no-cache, no-transform): caches "
                "on the way may keep it",
                "let the proxy leave Cache-Control as it is",
            ),
        )

    async def _body(self, reader: StreamProbe, began: float) -> list[Finding]:
        """Return what the stream's opening and then its silence say."""
        opened = await reader.opened()
        if opened is None:
            return [self._missing(reader, "its first bytes, sent at once, did not come")]
        first = ok(f"first bytes after {1000 * (time.monotonic() - began):.0f} ms")
        heartbeat = float(opened["heartbeatSeconds"])
        silent = time.monotonic()
        came = await reader.first("", heartbeat + LATE_SECONDS)
        silence = time.monotonic() - silent
        if came is not None:
            return [first, ok(f"a heartbeat after {silence:.1f} s of silence")]
        if reader.ended and not reader.error:
            end = failure(
                f"{self._proxy.name} ends it after {silence:.1f} s of silence; the heartbeat comes "
                f"after {heartbeat:g} s",
                f"{self._proxy.patient}, or serve with --heartbeat-seconds below its limit",
            )
            return [first, end]
        return [first, self._missing(reader, f"no heartbeat came within {silence:.0f} s")]

    def _missing(self, reader: StreamProbe, seen: str) -> Finding:
        if reader.error:
            return failure(f"the server ends it: {reader.error}", "see its log and its limits")
        gathers = f"{self._proxy.name} gathers the stream"
        how = "the connection ended first" if reader.ended else gathers
        return failure(f"{seen}: {how}", self._proxy.unbuffered)

    async def _resuming(self) -> Findings:
        """Say whether a cursor gets through, in the header and in the address.

        By one that no server accepts: what gets through is refused, whatever the table holds.
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
                f"{' and '.join(lost)} does not reach the server: readers that come back miss what "
                "was sent meanwhile",
                "let the proxy pass it on",
            )
        return ok("Last-Event-ID and ?cursor= reach the server")

    async def _same_database(self) -> Findings:
        """Say whether the server at the address follows the database that --dsn names."""
        if self._store is None:
            return unchecked("no database is known here", "give --dsn")
        await self._store.schema.check()
        newest = await self._store.newest()
        epoch = (await self._store.state()).epoch
        deadline = time.monotonic() + LABEL_SECONDS
        while True:
            async with self._reader() as reader:
                opened = await reader.opened()
            if opened is None:
                return unchecked("the stream does not open")
            if epoch is not None and opened["epoch"] != epoch:
                return failure(
                    f"the server's epoch is {opened['epoch']}, the database's {epoch}: the address "
                    "leads elsewhere, or the server must be restarted after a restore",
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
        """Publish a label about its own source and take it back; say when each arrived."""
        source = self._target.publish_as
        if source is None:
            do = "give --publish-as DID: it stores a label of that source, and its negation"
            return unchecked("nothing is published unasked", do)
        if self._store is None:
            return unchecked("no database is known here", "give --dsn")
        await self._store.schema.check()
        table = LabelTable(self._store.database)
        took = []
        async with self._reader() as reader:
            if await reader.opened() is None:
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
                if await reader.first(f'"seq":{seqs[0]},', LABEL_SECONDS) is None:
                    return failure(
                        f"seq {seqs[0]} was stored and did not arrive within {LABEL_SECONDS:g} s",
                        "see the findings above; the label is stored all the same",
                    )
                took.append(f"{1000 * (time.monotonic() - began):.0f} ms")
        return ok(f"from before the INSERT to here {took[0]}, its negation {took[1]}")

    async def _doors(self) -> Findings:
        """Say whether metrics and publishing are open to whoever comes from here."""
        async with self._client() as client:
            metrics = await client.get("/metrics")
            # Without a token the server itself says 401; a proxy that keeps the door says 403.
            publish = await client.post(
                "/labels", json={"labels": []}, headers={"Authorization": ""}
            )
        return doors_finding(
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
            timeout=httpx.Timeout(FIRST_SECONDS),
            follow_redirects=True,
            verify=self._target.tls,
        )

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[StreamProbe]:
        """Open a stream that shows no label but the doctor's; TimeoutError without an answer."""
        async with self._client() as client:
            request = client.build_request(
                "GET",
                "/stream",
                params={"values": VALUE},
                # A compressor on the way may compress.
                headers={"Accept": "text/event-stream", "Accept-Encoding": "gzip"},
                timeout=httpx.Timeout(FIRST_SECONDS, read=None),
            )
            async with asyncio.timeout(FIRST_SECONDS):
                response = await client.send(request, stream=True)
                if response.status_code != 200:
                    await response.aread()
            reader = StreamProbe(response)
            async with aclosing(response), aclosing(reader.blocks):
                yield reader


class StreamProbe:
    """One stream, whether it ended, and with which error of the server."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.blocks = self._read()
        self.ended = False
        self.error = ""

    async def opened(self) -> dict[str, Any] | None:
        """Return what StreamOpened says; None when it does not come in time."""
        data = await self.first('"StreamOpened"', FIRST_SECONDS)
        opened: dict[str, Any] | None = None if data is None else ujson.loads(data)
        return opened

    async def first(self, part: str, seconds: float) -> str | None:
        """Return the data of the next block that contains `part`, which may be empty.

        None: an error, the end, or nothing came in time; and nothing more can be read.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for block in self.blocks:
                    data = block.data or ""
                    if block.event == "error":
                        self.error = words_in(data, "an error")
                        return None
                    if part in data:
                        return data
                self.ended = True
        return None

    async def _read(self) -> AsyncGenerator[Block]:
        stream = EventStream()
        # A proxy that cuts says nothing; when it happened is all there is to know.
        with suppress(httpx.TransportError, httpx.DecodingError):
            async for piece in self.response.aiter_bytes():
                for block in stream.push(piece):
                    yield block


def doors_finding(metrics_open: bool, publish_open: bool, local: bool) -> Finding:
    """Return what to say of doors that should be closed to the world."""
    names = {"/metrics": metrics_open, "publishing": publish_open}
    open_doors = [name for name, is_open in names.items() if is_open]
    if not open_doors:
        return ok("metrics and publishing are closed to whoever comes from here")
    seen = f"{' and '.join(open_doors)} can be reached from here"
    if local:
        return unchecked(f"{seen}, which is this machine", "ask from another one, too")
    return warning(seen, "allow the addresses that need it, as nginx/sse_labels.conf does")


def _said(response: httpx.Response) -> str:
    """Return the server's own words, or what the status is called."""
    return words_in(response.text, response.reason_phrase or "no reason given")
