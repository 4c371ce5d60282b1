"""Reading subscribeLabels of any labeler over a WebSocket.

Promises: a lost connection is made anew after the last seq; nothing that a server sends is an
error of ours or takes more memory than a message.
Stands before `continuity`, which judges what comes here.
Does not belong here: what is right and wrong; a second reading: the lexicon promises none.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import httpx
from aiohttp import WSMsgType

from sse_labels.client.event_stream import MESSAGE_MAX_BYTES
from sse_labels.client.retries import TOKEN_HINT
from sse_labels.formats import expires_at
from sse_labels.seq import number_in
from sse_labels.verification.continuity import Continuity, words_of
from sse_labels.verification.event_stream import place_of
from sse_labels.verification.findings import Findings, Kind
from sse_labels.verification.patience import (
    CONNECT_SECONDS,
    FINAL_ERRORS,
    PROGRESS_SECONDS,
    TEMPORARY,
    Lost,
    Patience,
    Refused,
)

#: A server that does not answer a ping for half of this is gone.
PING_SECONDS = 30.0
#: How long a server has to answer a close.
CLOSE_SECONDS = 2.0


class SocketReading:
    """The one reading of a subscription."""

    def __init__(
        self,
        url: httpx.URL,
        continuity: Continuity,
        findings: Findings,
        *,
        headers: Mapping[str, str],
        tls: ssl.SSLContext,
        follow: bool,
        quiet_seconds: float,
        retry_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._url = url
        self._place = place_of(url)
        self._continuity = continuity
        self._findings = findings
        self._headers = headers
        self._tls = tls
        self._follow = follow
        self._quiet_seconds = quiet_seconds
        self._patience = Patience(retry_seconds)
        self._say = say
        self.interrupted = False
        self._reached = False
        self._reading: asyncio.Task[None] | None = None
        self._position = continuity.position
        self._told = time.monotonic()
        self._begun = time.time()
        #: The newest seq when it began; sse-labels tells it, the lexicon does not.
        self._head: int | None = None
        self._live = False

    async def run(self) -> None:
        """Read history, or until `stop`; raise Refused when nobody ever answered.

        History ends at the head where one is told, else with a label that was made since it began,
        or when all is quiet.
        """
        self._reading = asyncio.create_task(self._read(), name="reading a subscription")
        try:
            await self._reading
        except asyncio.CancelledError:
            if not self.interrupted:
                raise

    def stop(self) -> None:
        """End it; a message is taken in one step and not cut."""
        self.interrupted = True
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        # The time for each connection is bounded below; a subscription has no end.
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
        trace = aiohttp.TraceConfig()
        trace.on_request_end.append(self._note_head)
        async with aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, trace_configs=[trace]
        ) as session:
            while True:
                try:
                    try:
                        return await self._connection(session)
                    except Lost as error:
                        lost = error
                    wait = self._patience.wait_seconds(lost)
                except Refused as error:
                    if not self._reached:
                        raise
                    self._findings.add(Kind.STREAM, str(error))
                    return None
                where = f"after seq {self._continuity.position}"
                self._say(f"{lost}; reconnecting {where} in {wait:.1f} s")
                await asyncio.sleep(wait)

    async def _connection(self, session: aiohttp.ClientSession) -> None:
        """Read one socket until history is over; raise Lost or Refused."""
        socket = await self._open(session)
        try:
            if self._reached:
                self._continuity.reconnects += 1
            self._reached = True
            self._patience.opened()
            if self._at_head() and not self._follow:
                return
            loop = asyncio.get_running_loop()
            heard = loop.time()
            while True:
                try:
                    # aiohttp's own time-out begins anew with every ping.
                    async with asyncio.timeout_at(
                        None if self._follow else heard + self._quiet_seconds
                    ):
                        message = await socket.receive()
                except TimeoutError:
                    return
                heard = loop.time()
                self._take(message)
                if self._live and not self._follow:
                    return
                if self._findings.hopeless:
                    raise Refused("given up: too much of it is wrong")
                self._look_at_the_clock()
        finally:
            await socket.close()

    async def _open(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        cursor = str(self._continuity.position)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await session.ws_connect(
                    str(self._url.copy_set_param("cursor", cursor)),
                    max_msg_size=MESSAGE_MAX_BYTES,
                    heartbeat=PING_SECONDS,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                    ssl=self._tls,
                )
        except aiohttp.WSServerHandshakeError as error:
            text = f"{self._place} answered {error.status}, no WebSocket"
            if error.status == httpx.codes.UNAUTHORIZED:
                text += f" ({TOKEN_HINT})"
            if error.status in TEMPORARY:
                raise Lost(text) from None
            raise Refused(text) from None
        except aiohttp.InvalidURL:
            raise Refused(f"{self._place} is no address that can be asked") from None
        except TimeoutError:
            problem = f"no answer within {CONNECT_SECONDS:g} s"
        except (aiohttp.ClientError, OSError) as error:
            problem = str(error) or type(error).__name__
        if not self._reached:
            # An address that is wrong does not mend by waiting.
            raise Refused(f"{self._place}: {problem}")
        raise Lost(problem)

    def _take(self, message: aiohttp.WSMessage) -> None:
        match message.type:
            case WSMsgType.BINARY:
                self._take_frame(message.data)
            case WSMsgType.TEXT:
                text = f"after seq {self._continuity.position}: a frame of text, expected binary"
                self._findings.add(Kind.EVENT, text)
            case WSMsgType.ERROR if isinstance(message.data, aiohttp.WebSocketError):
                # Not by the network: TCP gives bytes as they were sent.
                if message.data.code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
                    limit = f"{MESSAGE_MAX_BYTES} bytes"
                    raise Refused(f"{self._place} sends a message of more than {limit}")
                problem = words_of(str(message.data.args[-1]), None)
                raise Refused(f"{self._place} does not speak WebSocket: {problem}")
            case WSMsgType.CLOSE:
                raise Lost(f"the server closed the socket with {message.data}")
            case _:
                raise Lost("the connection broke off")

    def _take_frame(self, payload: bytes) -> None:
        said = self._continuity.frame(payload)
        if said is not None and said.type is None:
            name = said.body.get("error")
            text = words_of(name, said.body.get("message"))
            if name in FINAL_ERRORS:
                raise Refused(f"{self._place} says {text}")
            raise Lost(f"the server ended the stream: {text}")
        if said is not None and said.type == "#labels":
            self._live = self._is_new(said.body) if self._head is None else self._at_head()

    def _at_head(self) -> bool:
        return self._head is not None and self._continuity.position >= self._head

    def _is_new(self, body: Mapping[str, Any]) -> bool:
        """Say whether a label was made since this began; one from the future was not."""
        labels = body.get("labels")
        made = [each.get("cts") for each in labels if isinstance(each, dict)] if labels else []
        times = [expires_at(cts) for cts in made if isinstance(cts, str)]
        now = time.time()
        return any(at is not None and self._begun < at <= now for at in times)

    async def _note_head(
        self, _session: object, _context: object, ended: aiohttp.TraceRequestEndParams
    ) -> None:
        if self._head is None:
            self._head = number_in(ended.response.headers.get("Sse-Labels-Head", ""))

    def _look_at_the_clock(self) -> None:
        if self._continuity.position != self._position:
            self._position = self._continuity.position
            self._patience.progress()
        now = time.monotonic()
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            self._say(f"read up to seq {self._position}")
