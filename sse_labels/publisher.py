"""The publisher: checks labels and stores them, all of a request or none.

Promises: what it returns seqs for is committed; a label that breaks the lexicon
is named by its index and field, and then nothing is stored.
Stands at the door of the corridor, before the label row.
Does not belong here: HTTP, tokens, streaming.
"""

from __future__ import annotations

from collections.abc import Sequence

from sse_labels.errors import InvalidLabel
from sse_labels.labels import Label, parse_label
from sse_labels.metrics import Metrics
from sse_labels.store import Store


class Publisher:
    """Stores labels through the store's pool."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics

    async def publish(self, given: Sequence[object]) -> list[int]:
        """Return one seq per label, in the same order.

        Raises InvalidLabel for the first label that is wrong, DatabaseUnavailable when nothing
        was stored, or when the connection was lost before the database could say.
        """
        labels: list[Label] = []
        for index, item in enumerate(given):
            try:
                labels.append(parse_label(item))
            except InvalidLabel as error:
                self._metrics.count["labels_refused"] += len(given)
                raise error.at(index) from None
        seqs = await self._store.insert(labels)
        self._metrics.count["labels_published"] += len(seqs)
        return seqs
