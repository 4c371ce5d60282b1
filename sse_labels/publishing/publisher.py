"""The publisher: checks, signs and stores the labels of a request, all of them or none.

Promises: labels are committed when `publish` returns their seqs. If a label breaks the lexicon, the
error names its index and field, and no label is stored.
Does not belong here: HTTP, tokens.
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
        """`keys` sign unsigned labels: those of `signing_did`, or of all sources if it is None.

        A signature that comes with a label of `signing_did`, or of a source in `source_keys`, must
        be valid.
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
        """Let only one request run such a block in each step of the event loop.

        Without this, streams had to wait for the blocks of 50 requests.
        """
        async with self._turn:
            yield
            await asyncio.sleep(0)

    async def publish(self, given: Sequence[object], key: bytes | None = None) -> list[int]:
        """Return one seq for each label, in the same order.

        With a `key` the same labels are stored once, even if this is called again within a day.
        Raises:
        - InvalidLabel for the first wrong label
        - IdempotencyKeyReused when the key belongs to other labels
        - Forbidden when the database does not let this server publish
        - LabelsRefused when the database refuses the labels themselves
        - DatabaseUnavailable when no label was stored, or when the connection was lost before the
          answer. Then a key makes it safe to try again.
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
        """Return the next labels in their stored form. Add them to the digest for the key."""
        labels: list[Label] = []
        try:
            for index, item in enumerate(given[start : start + CHECKED_AT_ONCE], start):
                try:
                    labels.append(parse_label(item))
                    check_subject(labels[-1])
                except InvalidLabel as error:
                    raise error.at(index) from None
            if digest is not None:
                # The digest is over the JSON form, so that it stays the same after an update.
                digest.update("".join(f"{dumps(label_json(*each))}\n" for each in labels).encode())
            if self._signing_key is not None or self._source_keys is not None:
                # 25 to 35 µs for each label, most of it without the interpreter's lock.
                labels = await asyncio.to_thread(self._signed, labels, start)
        except InvalidLabel:
            self._metrics.count["labels_refused"] += len(given)
            raise
        return labels

    def _signed(self, labels: Sequence[Label], start: int) -> list[Label]:
        """Return the labels in their stored form. Raises InvalidLabel for a wrong signature."""
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
        """Return whether a signature is known to be wrong.

        For a label of `signing_did` without a known public key, the signing key decides.
        """
        verdict = self._source_keys.check(label) if self._source_keys else Verdict.UNKNOWN
        if verdict is Verdict.UNKNOWN and self._signing_key and self._signing_did == label.src:
            return not self._signing_key.has_signed(label)
        return verdict is Verdict.INVALID
