"""Checks of the way to a reader: what a proxy between makes of the stream.

Promises: what is wrong is named with the proxy that does it, if that names itself,
and with what it is to be told; nothing waits longer than the server's heartbeat
and a few seconds. Nothing is stored, unless a source to publish as is given.
Stands outside: it is a reader like any other, and asks over HTTP alone.
Does not belong here: the database, but for what the two must agree on.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx
import ujson

from sse_labels.client.event_stream import TOKEN_HINT, is_event_stream
from sse_labels.doctor.database_checks import clock_finding
from sse_labels.doctor.findings import Finding, failure, ok, unchecked, warning
from sse_labels.doctor.proxies import UNKNOWN, Proxy, proxy_of
from sse_labels.errors import DatabaseRefused, DatabaseUnavailable
from sse_labels.label_table import LabelTable
from sse_labels.labels import Label, parse_label
from sse_labels.store import Store

#: What the server sends at once must be here by then.
FIRST_SECONDS = 5.0
#: How much later than promised a heartbeat may come.
LATE_SECONDS = 3.0
#: How long a label may take; it takes milliseconds.
LABEL_SECONDS = 5.0
#: The value of the labels that are published here, and a filter that keeps all others away.
VALUE = "sse-labels-doctor"
_OPENED = re.compile(rb"event: info\ndata: (\{[^\n]*\"StreamOpened\"[^\n]*\})\n\n")
_ERROR = re.compile(rb"event: error\ndata: (\{[^\n]*\})\n\n")


class WayChecks:
    """Looks at one address, as its readers see it."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        tls: ssl.SSLContext,
        store: Store | None,
        publish_as: str | None,
    ) -> None:
        """`store` is where the labels should come from; None when no database is known."""
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = tls
        self._store = store
        self._publish_as = publish_as
        #: Who stands between, as far as `address` could see.
        self._proxy = UNKNOWN

    def checks(self) -> dict[str, Callable[[], Awaitable[list[Finding]]]]:
        """Return all of them by subject; the first says whether the others make sense."""
        return {
            "address": self.address,
            "protocol": self.protocol,
            "stream": self.stream,
            "resuming": self.resuming,
            "same database": self.same_database,
            "a label's way": self.label,
            "closed doors": self.doors,
        }

    async def address(self) -> list[Finding]:
        """Say who answers, whether the server behind is ready, and what its clock says."""
        async with self._client() as client:
            before = time.time()
            response = await client.get(f"{self._url}/health/ready")
            after = time.time()
        proxy = proxy_of(response.headers)
        through = f" through {proxy.name}" if proxy else ""
        self._proxy = proxy or UNKNOWN
        status = response.status_code
        if status == 503:
            found = [
                failure("address", f"the server says{through}: {_said(response)}", "see its log")
            ]
        elif status != 200 or "json" not in response.headers.get("content-type", ""):
            found = [
                failure(
                    "address",
                    f"/health/ready answers {status}{through}, not as sse-labels would",
                    "give the address under which /stream is; let the proxy pass /health on",
                )
            ]
        else:
            found = [ok("address", f"a server answers{through} ({1000 * (after - before):.0f} ms)")]
        if date := response.headers.get("date"):
            # It has whole seconds, rounded down.
            theirs = parsedate_to_datetime(date).timestamp() + 0.5
            precision = 0.5 + (after - before) / 2
            found.append(clock_finding("server's clock", theirs - (before + after) / 2, precision))
        return found

    async def protocol(self) -> list[Finding]:
        """Say what a browser would speak."""
        parts = urlsplit(self._url)
        if parts.scheme == "http":
            if is_loopback(parts.hostname or ""):
                return [unchecked("protocol", "HTTP/1.1 without TLS, on this machine alone")]
            return [
                warning(
                    "protocol",
                    "no TLS: whoever is between can read and forge, and browsers open only six "
                    "connections to a host over HTTP/1.1",
                    "serve it by https with HTTP/2, as nginx/sse_labels.conf does",
                )
            ]
        # httpx sets its own for each connection.
        self._tls.set_alpn_protocols(["h2", "http/1.1"])
        async with asyncio.timeout(FIRST_SECONDS):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or 443, ssl=self._tls
            )
        tls = writer.get_extra_info("ssl_object")
        writer.close()
        if tls.selected_alpn_protocol() == "h2":
            return [ok("protocol", f"HTTP/2, {tls.version()}")]
        return [
            warning(
                "protocol",
                "HTTP/1.1: browsers open only six connections to a host, and hang at the seventh "
                "tab",
                "switch HTTP/2 on (nginx: `listen 443 ssl http2`)",
            )
        ]

    async def stream(self) -> list[Finding]:
        """Say whether bytes come as they are sent: the first ones, and a heartbeat."""
        began = time.monotonic()
        try:
            async with self._reader() as reader:
                return [
                    *self._head_findings(reader.response),
                    *await self._body_findings(reader, began),
                ]
        except TimeoutError:
            return [
                failure(
                    "stream",
                    f"no answer within {FIRST_SECONDS:g} s, where the server sends it at once: "
                    f"{self._proxy.name} gathers the stream",
                    self._proxy.unbuffered,
                )
            ]

    def _head_findings(self, response: httpx.Response) -> list[Finding]:
        proxy = self._proxy
        if response.status_code != 200:
            do = TOKEN_HINT if response.status_code == 401 else "see the message"
            return [failure("stream", f"{response.status_code}: {_said(response)}", do)]
        found = []
        kind = response.headers.get("content-type", "")
        if not is_event_stream(kind):
            found.append(
                failure("stream", f"its type is {kind!r}, no event stream", "give its address")
            )
        if coding := response.headers.get("content-encoding"):
            found.append(
                warning(
                    "stream",
                    f"{proxy.name} compresses it ({coding}), against no-transform: "
                    "a compressor may gather, and keeps memory for each reader",
                    proxy.uncompressed,
                )
            )
        if "no-transform" not in response.headers.get("cache-control", ""):
            found.append(
                warning(
                    "stream",
                    "Cache-Control is not what the server sends (no-cache, no-transform): caches "
                    "on the way may keep it",
                    "let the proxy leave Cache-Control as it is",
                )
            )
        return found

    async def _body_findings(self, reader: Reader, began: float) -> list[Finding]:
        """Return what the stream's opening and then its silence say."""
        proxy = self._proxy
        if reader.response.status_code != 200:
            return []
        opened = await reader.opened(FIRST_SECONDS)
        if said := reader.error():
            return [_ended_by_server(said)]
        if opened is None:
            return [_buffered(proxy, reader, "its first bytes, sent at once, did not come")]
        found = [ok("stream", f"first bytes after {1000 * (time.monotonic() - began):.0f} ms")]
        heartbeat = float(opened["heartbeatSeconds"])
        silent = time.monotonic()
        more = await reader.more(heartbeat + LATE_SECONDS)
        silence = time.monotonic() - silent
        if said := reader.error():
            return [*found, _ended_by_server(said)]
        if more:
            return [*found, ok("stream", f"a heartbeat after {silence:.1f} s of silence")]
        if reader.ended:
            found.append(
                failure(
                    "stream",
                    f"{proxy.name} ends it after {silence:.1f} s of silence; the heartbeat comes "
                    f"after {heartbeat:g} s",
                    f"{proxy.patient}, or serve with --heartbeat-seconds below its limit",
                )
            )
        else:
            found.append(_buffered(proxy, reader, f"no heartbeat came within {silence:.0f} s"))
        return found

    async def resuming(self) -> list[Finding]:
        """Say whether a cursor gets through, in the header and in the address.

        By one that no server accepts: what gets through is refused, whatever the table holds.
        """
        ways: tuple[tuple[str, dict[str, Any]], ...] = (
            ("the header Last-Event-ID", {"headers": {"Last-Event-ID": VALUE}}),
            ("the query (?cursor=)", {"params": {"cursor": VALUE}}),
        )
        lost = []
        async with self._client() as client:
            for way, more in ways:
                async with client.stream("GET", f"{self._url}/stream", **more) as response:
                    if response.status_code == 200:
                        lost.append(way)
                    elif response.status_code != 400:
                        await response.aread()
                        why = f"the stream answers {response.status_code}: {_said(response)}"
                        return [unchecked("resuming", why)]
        if lost:
            return [
                failure(
                    "resuming",
                    f"{' and '.join(lost)} does not reach the server: readers that come back miss "
                    "what was sent meanwhile",
                    "let the proxy pass it on",
                )
            ]
        return [ok("resuming", "Last-Event-ID and ?cursor= reach the server")]

    async def same_database(self) -> list[Finding]:
        """Say whether the server at the address follows the database that --dsn names."""
        if self._store is None:
            return [unchecked("same database", "no database is known here", "give --dsn")]
        await self._store.schema.check()
        newest = await self._store.newest()
        epoch = (await self._store.state()).epoch
        async with self._reader() as reader:
            opened = await reader.opened(FIRST_SECONDS)
        if opened is None:
            return [unchecked("same database", "the stream does not open")]
        if epoch is not None and opened["epoch"] != epoch:
            return [
                failure(
                    "same database",
                    f"the server's epoch is {opened['epoch']}, the database's {epoch}: the address "
                    "leads elsewhere, or the server must be restarted after a restore",
                    "check the address and --dsn, then restart the server",
                )
            ]
        head = int(opened["head"])
        deadline = time.monotonic() + LABEL_SECONDS
        while head < newest and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            head = await self._head()
        if head < newest:
            return [
                failure(
                    "same database",
                    f"the server's head is {head}, and stayed {newest - head} below the newest seq",
                    "see `open transactions` above, and the server's log",
                )
            ]
        return [ok("same database", f"epoch {epoch}, head {head}")]

    async def label(self) -> list[Finding]:
        """Publish a label and take it back; say when each arrived."""
        subject = "a label's way"
        if self._publish_as is None:
            do = "give --publish-as DID: it stores a label of that source, and its negation"
            return [unchecked(subject, "nothing is published unasked", do)]
        if self._store is None:
            return [unchecked(subject, "no database is known here", "give --dsn")]
        await self._store.schema.check()
        took = []
        async with self._reader() as reader:
            if await reader.opened(FIRST_SECONDS) is None:
                return [unchecked(subject, "the stream does not open")]
            for negation in (False, True):
                label = doctors_label(self._publish_as, negation=negation)
                began = time.monotonic()
                try:
                    seqs = await LabelTable(self._store.database).insert([label], None, b"")
                except (DatabaseUnavailable, DatabaseRefused) as error:
                    return [unchecked(subject, f"publishing failed: {error}")]
                assert seqs is not None  # noqa: S101 - without a key it always stores
                if not await reader.label(seqs[0], LABEL_SECONDS):
                    return [
                        failure(
                            subject,
                            f"seq {seqs[0]} was stored and did not arrive within "
                            f"{LABEL_SECONDS:g} s",
                            "see the findings above; the label is stored all the same",
                        )
                    ]
                took.append(f"{1000 * (time.monotonic() - began):.0f} ms")
        return [ok(subject, f"from before the INSERT to here {took[0]}, its negation {took[1]}")]

    async def doors(self) -> list[Finding]:
        """Say whether metrics and publishing are open to whoever comes from here."""
        local = is_loopback(urlsplit(self._url).hostname or "")
        async with self._client() as client:
            metrics = await client.get(f"{self._url}/metrics")
            # Without a token the server itself says 401; a proxy that keeps the door says 403.
            publish = await client.post(
                f"{self._url}/labels", json={"labels": []}, headers={"Authorization": ""}
            )
        return [doors_finding(metrics.status_code == 200, publish.status_code == 401, local)]

    async def _head(self) -> int:
        async with self._client() as client:
            response = await client.get(f"{self._url}/health/ready")
            response.raise_for_status()
            return int(ujson.loads(response.text)["head"])

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(FIRST_SECONDS),
            follow_redirects=True,
            verify=self._tls,
        )

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Reader]:
        """Open a stream that shows no label but the doctor's; TimeoutError without an answer."""
        # Whoever may compress is tempted to; silence is told by `Reader`.
        accept = {"Accept": "text/event-stream", "Accept-Encoding": "gzip"}
        client = self._client()
        try:
            request = client.build_request(
                "GET",
                f"{self._url}/stream",
                params={"values": VALUE},
                headers=accept,
                timeout=httpx.Timeout(FIRST_SECONDS, read=None),
            )
            async with asyncio.timeout(FIRST_SECONDS):
                response = await client.send(request, stream=True)
                if response.status_code != 200:
                    await response.aread()
            reader = Reader(response)
            try:
                yield reader
            finally:
                await reader.close()
        finally:
            await client.aclose()


class Reader:
    """What has come of one stream so far, and whether it ended."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.received = b""
        self.ended = False
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._read()) if response.status_code == 200 else None

    async def opened(self, seconds: float) -> dict[str, Any] | None:
        """Return what StreamOpened says; None when it did not come in time."""
        if not await self._until(lambda: _OPENED.search(self.received) is not None, seconds):
            return None
        found = _OPENED.search(self.received)
        assert found is not None  # noqa: S101 - it was found a line above
        opened: dict[str, Any] = ujson.loads(found[1])
        return opened

    def error(self) -> str:
        """Return with what the server itself has ended the stream; nothing when it has not."""
        found = _ERROR.search(self.received)
        return "" if found is None else _words(found[1].decode("utf-8", "replace"), "an error")

    async def label(self, seq: int, seconds: float) -> bool:
        """Return whether the label of this seq came in time."""
        start = b"id: %d\ndata: " % seq
        return await self._until(lambda: start in self.received, seconds)

    async def more(self, seconds: float) -> bool:
        """Return whether anything came in time, after what has come."""
        before = len(self.received)
        return await self._until(lambda: len(self.received) > before, seconds)

    async def close(self) -> None:
        """Leave."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.response.aclose()

    async def _until(self, enough: Callable[[], bool], seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not enough() and not self.ended:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            return False
        return enough()

    async def _read(self) -> None:
        try:
            async for data in self.response.aiter_bytes():
                self.received += data
                self._came.set()
        except httpx.TransportError:
            # A proxy that cuts says nothing; when it happened is all there is to know.
            pass
        finally:
            self.ended = True
            self._came.set()


def doctors_label(source: str, *, negation: bool) -> Label:
    """Return the label that is published, about its own source; raises InvalidLabel."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    neg = {"neg": True} if negation else {}
    return parse_label({"src": source, "uri": source, "val": VALUE, "cts": now, **neg})


def doors_finding(metrics_open: bool, publish_open: bool, local: bool) -> Finding:
    """Return what to say of doors that should be closed to the world."""
    names = {"/metrics": metrics_open, "publishing": publish_open}
    open_doors = [name for name, is_open in names.items() if is_open]
    if not open_doors:
        return ok("closed doors", "metrics and publishing are closed to whoever comes from here")
    seen = f"{' and '.join(open_doors)} can be reached from here"
    if local:
        return unchecked(
            "closed doors", f"{seen}, which is this machine", "ask from another one, too"
        )
    return warning(
        "closed doors", seen, "allow the addresses that need it, as nginx/sse_labels.conf does"
    )


def is_loopback(host: str) -> bool:
    """Return whether this names the machine itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _buffered(proxy: Proxy, reader: Reader, seen: str) -> Finding:
    how = "the connection ended first" if reader.ended else f"{proxy.name} gathers the stream"
    return failure("stream", f"{seen}: {how}", proxy.unbuffered)


def _ended_by_server(said: str) -> Finding:
    return failure("stream", f"the server ends it: {said}", "see its log and its limits")


def _said(response: httpx.Response) -> str:
    """Return the server's own words, or what the status is called."""
    otherwise = response.reason_phrase or "no reason given"
    try:
        return _words(response.text, otherwise)
    except httpx.ResponseNotRead:
        return otherwise


def _words(text: str, otherwise: str) -> str:
    """Return what an error says in JSON."""
    try:
        answer = ujson.loads(text)
        return f"{answer['error']}: {answer['message']}"
    except (ValueError, TypeError, KeyError):
        return otherwise
