"""The publisher: checks labels and stores them, all of a request or none.

Promises: what it returns seqs for is committed; a label that breaks the lexicon
is named by its index and field, and then nothing is stored.
Stands at the door of the corridor, before the label row.
Does not belong here: HTTP, tokens, streaming.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence

from sse_labels.database.schema import Schema
from sse_labels.errors import (
    DatabaseRefused,
    Forbidden,
    IdempotencyKeyReused,
    InvalidLabel,
    LabelsRefused,
)
from sse_labels.metrics import Metrics
from sse_labels.protocol.label import Label, check_subject, label_json, parse_label
from sse_labels.protocol.signatures import Verdict
from sse_labels.protocol.sse import dumps
from sse_labels.publishing.keys import Keys
from sse_labels.publishing.label_table import LabelTable

log = logging.getLogger(__name__)

#: Labels checked in one step of the event loop, about 2 ms.
CHECKED_AT_ONCE = 250


class Publisher:
    """Stores labels through the pool."""

    def __init__(
        self,
        table: LabelTable,
        schema: Schema,
        metrics: Metrics,
        keys: Keys,
    ) -> None:
        """Sign labels of `signing_did` (None: of every source) that come without a signature.

        Those that come signed by a source of `source_keys`, or by `signing_did`, must be so.
        """
        self._table = table
        self._schema = schema
        self._metrics = metrics
        self._signing_key = keys.signing_key
        self._signing_did = keys.signing_did
        self._source_keys = keys.source_keys
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Let no other request work in the same step of the event loop as the block.

        Streams had to wait for 50 requests when each of them took a step.
        """
        async with self._turn:
            yield
            await asyncio.sleep(0)

    async def publish(self, given: Sequence[object], key: bytes | None = None) -> list[int]:
        """Return one seq per label, in the same order.

        With a `key` the same labels are stored once, however often this is called within a day.
        Raises Forbidden when the database does not let this server publish, InvalidLabel for the
        first label that is wrong, IdempotencyKeyReused when the key belongs to other labels,
        LabelsRefused when the database does not take them, DatabaseUnavailable when nothing was
        stored, or when the connection was lost before the database could say (then a key makes
        trying again safe).
        """
        if self._schema.attached:
            raise Forbidden("publishing is off: this server reads Ozone's labels; label in Ozone")
        labels: list[Label] = []
        digest = hashlib.sha256()
        for start in range(0, len(given), CHECKED_AT_ONCE):
            async with self.turn():
                labels += await self._checked(given, start, None if key is None else digest)
        fingerprint = b"" if key is None else digest.digest()
        try:
            seqs = await self._table.insert(labels, key, fingerprint)
        except DatabaseRefused as error:
            self._metrics.count["labels_refused"] += len(given)
            if error.of_values:
                raise LabelsRefused(str(error)) from error
            log.error("publishing is refused", extra={"error": error})
            raise Forbidden(
                "publishing is off: the database does not let this server write; its log says why"
            ) from error
        if seqs is None:
            raise IdempotencyKeyReused("this Idempotency-Key was used for other labels")
        self._metrics.count["publish_requests"] += 1
        self._metrics.count["labels_published"] += len(seqs)
        return seqs

    async def _checked(
        self, given: Sequence[object], start: int, digest: hashlib._Hash | None
    ) -> list[Label]:
        """Return the next labels as they are stored, and add them to what the key stands for."""
        labels: list[Label] = []
        try:
            for index, item in enumerate(given[start : start + CHECKED_AT_ONCE], start):
                try:
                    labels.append(parse_label(item))
                    check_subject(labels[-1])
                except InvalidLabel as error:
                    raise error.at(index) from None
            if digest is not None:
                # Of their wire form, so that a key outlives an update of this program.
                digest.update("".join(f"{dumps(label_json(*each))}\n" for each in labels).encode())
            if self._signing_key is not None or self._source_keys is not None:
                # 25 to 35 µs each, most of it without the interpreter's lock.
                labels = await asyncio.to_thread(self._signed, labels, start)
        except InvalidLabel:
            self._metrics.count["labels_refused"] += len(given)
            raise
        return labels

    def _signed(self, labels: Sequence[Label], start: int) -> list[Label]:
        """Return the labels as they are stored; raise InvalidLabel for a wrong signature."""
        signed = []
        for index, label in enumerate(labels, start):
            if label.sig is None:
                if self._signing_key and self._signing_did in (None, label.src):
                    label = self._signing_key.sign(label)
            elif self._is_wrong(label):
                raise InvalidLabel(
                    "sig", f"is not a signature of {label.src} for this label", index
                )
            signed.append(label)
        return signed

    def _is_wrong(self, label: Label) -> bool:
        """Say whether a signature is known to be wrong; of its own source, the own key knows."""
        verdict = self._source_keys.check(label) if self._source_keys else Verdict.UNKNOWN
        if verdict is Verdict.UNKNOWN and self._signing_key and self._signing_did == label.src:
            return not self._signing_key.made(label)
        return verdict is Verdict.INVALID
