"""The errors found in a stream, and their number by kind.

Promises: the text of the first findings of each kind is kept, and all findings are counted. So a
stream with many errors needs little memory.
Does not belong here: the checks (`continuity`, `crosscheck`), printing (`report`).
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

#: The most findings of a kind whose text is kept.
SHOWN_MAX = 20
#: After this many wrong events the verification stops: a stream that repeats itself would be read
#: forever.
HOPELESS = 1000


class Kind(StrEnum):
    """The kind of a finding. The values are those of the output."""

    #: A seq came a second time, or after a larger one.
    ORDER = "order"
    #: An event or a message does not have the documented format.
    EVENT = "event"
    #: A label breaks the lexicon.
    MALFORMED = "malformed"
    #: A signature is not its source's.
    SIGNATURE = "signature"
    #: Only one of two readings has a label.
    LOST = "lost"
    #: Two readings have different labels under one seq.
    ALTERED = "altered"
    #: The stream could not be read to its end, or its epoch changed.
    STREAM = "stream"


class Findings:
    """All findings of one verification."""

    def __init__(self) -> None:
        self.counts: Counter[Kind] = Counter()
        #: The first findings of each kind, in the order in which they were found.
        self.shown: list[tuple[Kind, str]] = []
        #: Whether more reading is useless.
        self.hopeless = False

    def add(self, kind: Kind, text: str) -> None:
        """Count a finding, and keep its text while there are few of its kind."""
        self.counts[kind] += 1
        self.hopeless = self.counts[Kind.ORDER] + self.counts[Kind.EVENT] >= HOPELESS
        if self.counts[kind] <= SHOWN_MAX:
            self.shown.append((kind, text))

    @property
    def total(self) -> int:
        """The number of findings of all kinds."""
        return self.counts.total()
