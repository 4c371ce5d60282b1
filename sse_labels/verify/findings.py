"""What is wrong with a stream: findings, and how many there are of each kind.

Promises: the first few of each kind are kept in words, all are counted, so that a stream of
nothing but faults takes no memory.
Does not belong here: what is a fault (`continuity`, `crosscheck`); how it is printed (`report`).
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

#: Findings of a kind that are kept in words.
SHOWN_MAX = 20
#: Events that are out of order, or none at all, after which a stream has nothing more to say: one
#: that goes in circles would be read for ever.
HOPELESS = 1000


class Kind(StrEnum):
    """What was broken; the words are those of the output."""

    #: A seq came a second time, or after a larger one.
    ORDER = "order"
    #: An event or a message is not what the stream's description says.
    EVENT = "event"
    #: A label breaks the lexicon.
    MALFORMED = "malformed"
    #: A signature is not its source's.
    SIGNATURE = "signature"
    #: One reading has a label that the other has not.
    LOST = "lost"
    #: Two readings have different labels under one seq.
    ALTERED = "altered"
    #: The stream could not be read to its end, or became another one.
    STREAM = "stream"


class Findings:
    """All that was found wrong."""

    def __init__(self) -> None:
        self.counts: Counter[Kind] = Counter()
        #: The first of each kind, in the order in which they were found.
        self.shown: list[tuple[Kind, str]] = []
        #: Whether reading on is of no use.
        self.hopeless = False

    def add(self, kind: Kind, text: str) -> None:
        """Count a finding, and keep what it says while there are few."""
        self.counts[kind] += 1
        self.hopeless = self.counts[Kind.ORDER] + self.counts[Kind.EVENT] >= HOPELESS
        if self.counts[kind] <= SHOWN_MAX:
            self.shown.append((kind, text))

    @property
    def total(self) -> int:
        """How many there are of all kinds."""
        return self.counts.total()
