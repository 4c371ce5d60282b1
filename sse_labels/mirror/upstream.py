"""The upstream: another labeler's `subscribeLabels`, read over one WebSocket.

Promises: messages in the order in which they came, each with its labels as rows can hold them
and what cannot be stored beside them; a connection that died silently, or that brings nothing
whole, is found; whatever an upstream sends, other upstreams get their turn; every way in which it
ends is an `UpstreamLost` that says why.
Stands before the corridor: upstream -> following -> storing -> label row.
Does not belong here: cursors, storing, when to connect again (`following`).

Sources: lexicon `com.atproto.label.subscribeLabels`; https://atproto.com/specs/event-stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit, urlunsplit

import aiohttp
import libipld

from sse_labels import __version__, xrpc
from sse_labels.errors import InvalidLabel, SseLabelsError
from sse_labels.labels import Label, known_fields, parse_label
from sse_labels.mirror.bounds import Quota, Turn
from sse_labels.mirror.storing import Aside
from sse_labels.seq import SEQ_MAX, seconds_in
from sse_labels.signatures import SourceKeys, Verdict

#: How long a connection may take, until its WebSocket is open.
CONNECT_SECONDS = 10.0
#: A ping after so much silence; without an answer in half of it the connection is dead.
SILENCE_SECONDS = 30.0
#: A frame must be whole within this: of a sound connection one comes for each ping.
FRAME_SECONDS = 2 * SILENCE_SECONDS
#: How long a close may take to be sent; its answer is not waited for.
CLOSE_SECONDS = 2.0
CLOSE_FRAME = aiohttp.WSCloseCode.OK.to_bytes(2, "big")
#: What an upstream may send in a minute beside labels (news, pings, unknown messages): so many
#: messages, and KiB.
CHATTER_MAX = 4096
#: A label that is set aside is kept with its reason up to this: a right one has 12 KiB at most.
ASIDE_MAX_BYTES = 16 * 1024
#: What a message, and a label, weigh in memory beside their bytes.
MESSAGE_MEMORY = 512
LABEL_MEMORY = 512
#: Characters of an upstream's own words that are logged.
WORDS_MAX = 200
EPOCH = re.compile("[0-9a-f-]{36}")


class UpstreamLost(SseLabelsError):
    """The connection ended, or could not be made; `name` is the upstream's error, if it gave one.

    `after_seconds` is how long the upstream wants to be left alone.
    """

    def __init__(self, reason: str, name: str = "", after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.name = name
        self.after_seconds = after_seconds


class Labels(NamedTuple):
    """One `#labels` message: its seq, what can be stored, what cannot, and what it weighs."""

    seq: int
    labels: list[Label]
    aside: list[Aside]
    nbytes: int


class News(NamedTuple):
    """One `#info` message."""

    name: str
    message: str


class Upstream:
    """Where a labeler streams its labels, and what is taken of them."""

    def __init__(
        self,
        url: str,
        *,
        did: str | None = None,
        source_keys: SourceKeys | None = None,
        any_source: bool = False,
        message_max_bytes: int,
        message_max_labels: int = 10_000,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """With `did`, labels of that source alone are taken; those of others are left out.

        Without it, labels of every source with `any_source`, else those whose signature is right
        by `source_keys`. With `source_keys` labels whose signature is wrong are set aside.
        `tls` is what is trusted; None: this machine's authorities.
        """
        self.url = url
        self.did = did
        self._source_keys = source_keys
        self._any_source = any_source
        self._message_max_bytes = message_max_bytes
        self.message_max_labels = message_max_labels
        self._tls = tls
        #: Labels of other sources.
        self.left_out = 0

    @asynccontextmanager
    async def connected(self, cursor: int, epoch: str | None) -> AsyncIterator[Connection]:
        """Give a connection that begins after `cursor`; raise UpstreamLost."""
        query = {"cursor": str(cursor)} | ({"epoch": epoch} if epoch else {})
        parts = urlsplit(self.url)
        asked = "&".join(filter(None, (parts.query, urlencode(query))))
        answers: list[aiohttp.ClientResponse] = []
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"User-Agent": f"sse-labels/{__version__}"},
            middlewares=[_keeping_answers(answers)],
        ) as session:
            socket = await self._open(session, urlunsplit(parts._replace(query=asked)))
            try:
                yield Connection(self, socket, _epoch(answers[-1]))
            finally:
                # aiohttp's own close waits for an answer, and reads all that comes instead without
                # a turn for anybody: of pings that came at once for seconds.
                with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await socket.send_frame(CLOSE_FRAME, aiohttp.WSMsgType.CLOSE)
                answers[-1].close()
                await socket.close()

    async def _open(
        self, session: aiohttp.ClientSession, url: str
    ) -> aiohttp.ClientWebSocketResponse:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await session.ws_connect(
                    url,
                    heartbeat=SILENCE_SECONDS,
                    max_msg_size=self._message_max_bytes,
                    # aiohttp would answer all pings that came at once before anybody else's turn.
                    autoping=False,
                    autoclose=False,
                    ssl=self._tls or True,
                )
        except aiohttp.WSServerHandshakeError as error:
            hint = error.headers.get("Retry-After", "") if error.headers else ""
            raise UpstreamLost(
                f"it answered {error.status} instead of a WebSocket",
                after_seconds=seconds_in(hint) or 0,
            ) from error
        except TimeoutError as error:
            raise UpstreamLost(f"no WebSocket was open within {CONNECT_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamLost(words(str(error)) or type(error).__name__) from error

    def taken(self, seq: int, place: int, given: Any) -> Label | Aside | None:
        """Return one label of a message, or why it is set aside; None when it is left out."""
        try:
            label = self._parsed(xrpc.json_label(given))
        except InvalidLabel as error:
            return _aside(seq, place, str(error), given)
        if self.did not in (None, label.src):
            self.left_out += 1
            return None
        verdict = self._source_keys.check(label) if self._source_keys else Verdict.UNKNOWN
        if verdict is Verdict.INVALID:
            reason = f"sig: is not a signature of {words(label.src)} for this label"
            return _aside(seq, place, reason, given)
        if self.did is None and not self._any_source and verdict is not Verdict.VALID:
            self.left_out += 1
            return None
        return label

    def _parsed(self, given: Any) -> Label:
        """Return a label without the fields that the lexicon does not know; raise InvalidLabel.

        A signature may cover them: then they are kept, and refused, unless a key of the source
        says that it does not.
        """
        known = known_fields(given)
        label = parse_label(known)
        if label.sig is not None and known != given and not self._is_signed(label):
            return parse_label(given)
        return label

    def _is_signed(self, label: Label) -> bool:
        return self._source_keys is not None and self._source_keys.check(label) is Verdict.VALID


class Connection:
    """One WebSocket to an upstream that is open."""

    def __init__(
        self, upstream: Upstream, socket: aiohttp.ClientWebSocketResponse, epoch: str | None
    ) -> None:
        self._upstream = upstream
        self._socket = socket
        #: Which life of its database it streams, where it tells.
        self.epoch = epoch
        #: The seq of its last message.
        self._seq = 0
        self._turn = Turn()
        self._chatter = Quota(CHATTER_MAX)

    async def next(self) -> Labels | News | None:
        """Return the next message, None for one of another kind; raise UpstreamLost at the end."""
        try:
            async with asyncio.timeout(FRAME_SECONDS):
                message = await self._socket.receive()
                self._turn.begin()
                if message.type is aiohttp.WSMsgType.PING:
                    await self._socket.pong(message.data)
        except TimeoutError:
            raise UpstreamLost(f"no whole frame came within {FRAME_SECONDS:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamLost(words(str(error)) or type(error).__name__) from error
        match message.type:
            case aiohttp.WSMsgType.BINARY:
                found = await self._read(message.data)
            case aiohttp.WSMsgType.PING | aiohttp.WSMsgType.PONG:
                found = None
            case aiohttp.WSMsgType.TEXT:
                raise UpstreamLost("it sent text, which is no message of an event stream")
            case aiohttp.WSMsgType.ERROR:
                raise UpstreamLost(words(str(message.data)) or type(message.data).__name__)
            case _:
                code = self._socket.close_code
                raise UpstreamLost("it closed the connection" + (f" with {code}" if code else ""))
        if not isinstance(found, Labels):
            weight = 1 + len(message.data) // 1024
            if self._chatter.take(weight) < weight:
                raise UpstreamLost(
                    f"it sent more than {CHATTER_MAX} messages, or KiB, without labels in a minute"
                )
        await self._turn.end()
        return found

    async def _read(self, payload: bytes) -> Labels | News | None:
        try:
            type_, body = xrpc.decode(payload)
        except xrpc.MalformedMessage as error:
            raise UpstreamLost(f"it sent what is no message: {error}") from error
        match type_:
            case None:
                name, text = words(body.get("error")), words(body.get("message"))
                raise UpstreamLost(f"it ended the stream: {name}: {text}", name)
            case "#labels":
                return await self._labels(body, len(payload))
            case "#info":
                return News(words(body.get("name")), words(body.get("message")))
        # The specification of event streams: types that are not known are ignored.
        return None

    async def _labels(self, body: dict[str, Any], nbytes: int) -> Labels:
        seq, given = body.get("seq"), body.get("labels")
        if type(seq) is not int or not 0 < seq <= SEQ_MAX or not isinstance(given, list):
            raise UpstreamLost("it sent #labels without a seq and labels")
        if seq < self._seq:
            # What a cursor above it would hide is another's: it is asked anew, and says so.
            raise UpstreamLost(f"its seqs went back: {seq} came after {self._seq}")
        most = self._upstream.message_max_labels
        if len(given) > most:
            raise UpstreamLost(f"it sent {len(given)} labels in seq {seq}, expected {most} at most")
        self._seq = seq
        labels, aside = [], []
        weight = nbytes + MESSAGE_MEMORY
        for place, each in enumerate(given):
            # A signature takes 40 µs to check.
            await self._turn.end()
            taken = self._upstream.taken(seq, place, each)
            if isinstance(taken, Label):
                labels.append(taken)
                weight += LABEL_MEMORY
            elif taken is not None:
                aside.append(taken)
                weight += LABEL_MEMORY + len(taken.label)
        return Labels(seq, labels, aside, weight)


def _aside(seq: int, place: int, reason: str, given: Any) -> Aside:
    """Return what is kept of a label: itself, unless it is larger than any right one."""
    try:
        label = libipld.encode_dag_cbor(given)
    except (ValueError, RecursionError):
        return Aside(seq, place, f"{reason}; it cannot be encoded", b"")
    if len(label) > ASIDE_MAX_BYTES:
        return Aside(seq, place, f"{reason}; {len(label)} bytes are not kept", b"")
    return Aside(seq, place, reason, label)


def _keeping_answers(answers: list[aiohttp.ClientResponse]) -> aiohttp.ClientMiddlewareType:
    """Return what keeps the answer to a handshake, and refuses to be redirected.

    A WebSocket of aiohttp hides its head; and `ws_connect` would follow, into this network or from
    wss to ws.
    """

    async def keep(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        answer = await handler(request)
        if 300 <= answer.status < 400:
            answer.close()
            where = words(answer.headers.get("Location"))
            raise UpstreamLost(f"it redirects ({answer.status}) to {where}, which is not followed")
        answers.append(answer)
        return answer

    return keep


def _epoch(answer: aiohttp.ClientResponse) -> str | None:
    epoch = answer.headers.get("Sse-Labels-Epoch", "")
    # A UUID; anything else, which another server may say, could not even be stored.
    return epoch if EPOCH.fullmatch(epoch) else None


def words(said: object) -> str:
    """Return what an upstream said, in one line of bounded length; nothing when it is no text."""
    text = said[:WORDS_MAX] if isinstance(said, str) else ""
    return "".join(char if char.isprintable() else "?" for char in text)
