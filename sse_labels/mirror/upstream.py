"""The upstream: another labeler's `subscribeLabels`, read over one WebSocket.

Promises: messages keep their order. Each message has two lists: labels that can be stored, and
labels that are set aside. Other upstreams get a turn while this one is read.
Does not belong here: the socket (`client`), cursors, storing, when to connect again (`following`).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit, urlunsplit

import libipld

from sse_labels.client.answers import words
from sse_labels.client.label_socket import LabelSocket, label_socket
from sse_labels.client.retries import Lost
from sse_labels.errors import InvalidLabel
from sse_labels.mirror.bounds import Quota, Turn
from sse_labels.mirror.storing import Aside
from sse_labels.protocol import xrpc
from sse_labels.protocol.label import Label, known_fields, parse_label
from sse_labels.protocol.seq import SEQ_MAX
from sse_labels.protocol.signatures import SourceKeys, Verdict

#: How many messages without labels an upstream may send in a minute (news, pings, unknown ones).
#: Each KiB of them counts as one more message.
CHATTER_MAX = 4096
#: A label that is set aside is kept up to this size. A valid label has at most 12 KiB.
ASIDE_MAX_BYTES = 16 * 1024
#: The memory of a message, and of a label, besides their bytes.
MESSAGE_MEMORY = 512
LABEL_MEMORY = 512
EPOCH = re.compile("[0-9a-f-]{36}")


class Labels(NamedTuple):
    """One `#labels` message. `nbytes` is its size in memory."""

    seq: int
    labels: list[Label]
    aside: list[Aside]
    nbytes: int


class News(NamedTuple):
    """One `#info` message."""

    name: str
    message: str


class Upstream:
    """A labeler's address, and the rules for which of its labels are taken."""

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
        """Choose which labels are taken.

        With `did`, only labels of that source are taken. Without `did`, `any_source` takes the
        labels of every source. Without both, only labels with a valid signature by `source_keys`
        are taken. All others are left out. With `source_keys`, labels with an invalid signature
        are set aside. `tls` holds the trusted authorities. None means this machine's authorities.
        """
        self.url = url
        self.did = did
        self._source_keys = source_keys
        self._any_source = any_source
        self._message_max_bytes = message_max_bytes
        self.message_max_labels = message_max_labels
        self._tls = tls
        #: The number of labels that were left out.
        self.left_out = 0

    @asynccontextmanager
    async def connected(self, cursor: int, epoch: str | None) -> AsyncIterator[UpstreamConnection]:
        """Yield a connection that begins after `cursor`. Raises Lost or Refused."""
        query = {"cursor": str(cursor)} | ({"epoch": epoch} if epoch else {})
        parts = urlsplit(self.url)
        asked = "&".join(filter(None, (parts.query, urlencode(query))))
        async with label_socket(
            urlunsplit(parts._replace(query=asked)),
            message_max_bytes=self._message_max_bytes,
            tls=self._tls,
        ) as socket:
            yield UpstreamConnection(self, socket)

    def taken(self, seq: int, place: int, given: Any) -> Label | Aside | None:
        """Return the label, or an Aside with the reason. None: the label is left out."""
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
        """Return a label without fields that the lexicon does not know. Raises InvalidLabel.

        A signature may cover unknown fields. So a signed label with such fields is refused, unless
        a key of its source confirms the signature without these fields.
        """
        known = known_fields(given)
        label = parse_label(known)
        if label.sig is not None and known != given and not self._is_signed(label):
            return parse_label(given)
        return label

    def _is_signed(self, label: Label) -> bool:
        return self._source_keys is not None and self._source_keys.check(label) is Verdict.VALID


class UpstreamConnection:
    """One open WebSocket to an upstream."""

    def __init__(self, upstream: Upstream, socket: LabelSocket) -> None:
        self._upstream = upstream
        self._socket = socket
        epoch = socket.headers.get("Sse-Labels-Epoch", "")
        #: The epoch of the upstream's database, a UUID. None: the upstream sends none, or
        #: something else, which could not be stored.
        self.epoch = epoch if EPOCH.fullmatch(epoch) else None
        #: The seq of the last message.
        self._seq = 0
        self._turn = Turn()
        self._chatter = Quota(CHATTER_MAX)

    async def next(self) -> Labels | News | None:
        """Return the next message, or None for another type. Raises Lost or Refused."""
        try:
            payload = await self._socket.next()
            self._turn.begin()
            found = None if payload is None else await self._read(payload)
        except xrpc.MalformedMessage as error:
            raise Lost(f"it sent a malformed message: {error}") from error
        if not isinstance(found, Labels):
            weight = 1 + len(payload or b"") // 1024
            if self._chatter.take(weight) < weight:
                raise Lost(
                    f"it sent more than {CHATTER_MAX} messages, or KiB, without labels in a minute"
                )
        await self._turn.end()
        return found

    async def _read(self, payload: bytes) -> Labels | News | None:
        type_, body = xrpc.decode(payload)
        match type_:
            case None:
                name, text = words(body.get("error")), words(body.get("message"))
                raise Lost(f"it ended the stream: {name}: {text}", name)
            case "#labels":
                return await self._labels(body, len(payload))
            case "#info":
                return News(words(body.get("name")), words(body.get("message")))
        # The specification of event streams says: ignore unknown types.
        return None

    async def _labels(self, body: dict[str, Any], nbytes: int) -> Labels:
        seq, given = body.get("seq"), body.get("labels")
        if type(seq) is not int or not 0 < seq <= SEQ_MAX or not isinstance(given, list):
            raise Lost("it sent #labels without a seq and labels")
        if seq < self._seq:
            # The labels after a lower seq would be hidden by the cursor. A new connection with
            # the cursor gets the upstream's own error.
            raise Lost(f"its seqs went back: {seq} came after {self._seq}")
        most = self._upstream.message_max_labels
        if len(given) > most:
            raise Lost(f"it sent {len(given)} labels in seq {seq}, expected {most} at most")
        self._seq = seq
        labels, aside = [], []
        weight = nbytes + MESSAGE_MEMORY
        for place, each in enumerate(given):
            # The check of a signature takes 40 µs.
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
    """Return a label that is set aside. A label larger than any valid one is kept without bytes."""
    try:
        label = libipld.encode_dag_cbor(given)
    except (ValueError, RecursionError):
        return Aside(seq, place, f"{reason}; it cannot be encoded", b"")
    if len(label) > ASIDE_MAX_BYTES:
        return Aside(seq, place, f"{reason}; {len(label)} bytes are not kept", b"")
    return Aside(seq, place, reason, label)
