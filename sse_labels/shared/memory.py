"""The memory itself: a file without a name, mapped by every process of the server.

Promises: a number is written in one piece, and a snapshot is read whole or not at all,
also when its writer was killed in the midst of it.
Does not belong here: what the numbers mean.

    secret                 of this run: nobody outside knows what meets in one cell
    restarts               of the embedded PostgreSQL: one word, which the first process writes
    rates                  of publishers, for all
    parts, one a process:  words · cells of connections, of streams · two snapshots

A word is 8 bytes at a multiple of 8, which the processor writes at once. A snapshot is
written beside the one before, and then a word says which of both counts.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from enum import IntEnum

import ujson

from sse_labels.shared.counts import CELLS, RATES_BYTES, AddressTally, Rates, Tally
from sse_labels.shared.neighbours import Neighbours
from sse_labels.shared.sums import Snapshot

#: A snapshot has about 6 KiB; metrics' labels are names from the code, not from clients.
SNAPSHOT_MAX_BYTES = 64 * 1024
#: How much more this process may hold than another before it lets that one accept: so many, …
AHEAD = 4
#: … and this part of what it holds: a flood is not to wait for perfect balance.
AHEAD_PART = 16

_SECRET_BYTES = 64
_WORD_BYTES = 8
_CELLS_BYTES = CELLS * 4
_HALF_BYTES = _WORD_BYTES + SNAPSHOT_MAX_BYTES


class _Word(IntEnum):
    ALIVE = 0
    SERVING = 1
    CONNECTIONS = 2
    STREAMS = 3
    ALLOWED = 4
    SNAPSHOT = 5


_WORDS_BYTES = len(_Word) * _WORD_BYTES
_PART_BYTES = _WORDS_BYTES + 2 * _CELLS_BYTES + 2 * _HALF_BYTES
_RATES_AT = _SECRET_BYTES + _WORD_BYTES
_HEAD_BYTES = _RATES_AT + RATES_BYTES


class Memory:
    """All of it, as the process sees it that starts the others, and as each of them does."""

    def __init__(self, descriptor: int, workers: int) -> None:
        """Map what `create` made, by a descriptor of the same file."""
        self.descriptor = descriptor
        self.workers = workers
        self._mapped = mmap.mmap(descriptor, _HEAD_BYTES + workers * _PART_BYTES)
        self._view = memoryview(self._mapped)
        #: One word: how often the embedded PostgreSQL was restarted.
        self.restarts = self._view[_SECRET_BYTES:_RATES_AT].cast("q")

    @classmethod
    def create(cls, workers: int) -> Memory:
        """Return new memory; it lives as long as a process has it open."""
        descriptor = os.memfd_create("sse-labels")
        os.truncate(descriptor, _HEAD_BYTES + workers * _PART_BYTES)
        memory = cls(descriptor, workers)
        memory._view[:_SECRET_BYTES] = os.urandom(_SECRET_BYTES)
        return memory

    def share(self, index: int) -> Share:
        """Return the memory as process `index`, from 0, uses it."""
        return Share(self, index)

    def forget(self, index: int) -> None:
        """Free what a process held that has ended; what it counted stays."""
        part = self.part(index)
        part[: _Word.SNAPSHOT * _WORD_BYTES] = bytes(_Word.SNAPSHOT * _WORD_BYTES)
        part[_WORDS_BYTES : _WORDS_BYTES + 2 * _CELLS_BYTES] = bytes(2 * _CELLS_BYTES)

    def part(self, index: int) -> memoryview:
        """Return the part of one process, as bytes."""
        return self._view[_HEAD_BYTES + index * _PART_BYTES :][:_PART_BYTES]

    @property
    def secret(self) -> bytes:
        """What cells and rows are chosen by."""
        return bytes(self._view[:_SECRET_BYTES])

    @property
    def rates(self) -> memoryview:
        """The rates of publishers, as bytes."""
        return self._view[_RATES_AT:_HEAD_BYTES]

    def count_restart(self) -> None:
        """Count one more restart of the embedded PostgreSQL; for the first process alone."""
        self.restarts[0] += 1

    def close(self) -> None:
        """Give the file up."""
        os.close(self.descriptor)


class Share:
    """One process's view: its own part to write, the others' to read."""

    def __init__(self, memory: Memory, index: int) -> None:
        self.index = index
        parts = [memory.part(number) for number in range(memory.workers)]
        words = [part[:_WORDS_BYTES].cast("q") for part in parts]
        self._words = words[index]
        self._snapshots = [part[_WORDS_BYTES + 2 * _CELLS_BYTES :] for part in parts]
        self._others = [number for number in range(memory.workers) if number != index]
        self._all_words = words
        self._read: dict[int, Snapshot] = {}
        self._yielded_to: dict[int, int] = {}
        self.connections = self._tally(_Word.CONNECTIONS)
        self.streams = self._tally(_Word.STREAMS)
        cells = [
            [
                part[_WORDS_BYTES + kind * _CELLS_BYTES :][:_CELLS_BYTES].cast("i")
                for part in parts
            ]
            for kind in range(2)
        ]  # fmt: skip
        self.connections_by_address, self.streams_by_address = (
            AddressTally(kind[index], [kind[other] for other in self._others], memory.secret)
            for kind in cells
        )
        self.neighbours = Neighbours(index, memory.workers, memory.secret)
        self.rates = Rates(memory.rates, memory.descriptor, memory.secret)

    def _tally(self, word: _Word) -> Tally:
        return Tally(
            self._words[word : word + 1],
            [self._all_words[other][word : word + 1] for other in self._others],
        )

    @property
    def serving(self) -> bool:
        """Whether this process accepts connections; the others see it."""
        return bool(self._words[_Word.SERVING])

    @serving.setter
    def serving(self, value: bool) -> None:
        self._words[_Word.SERVING] = value

    def allow(self, connections: int) -> None:
        """Say how many connections this process may hold."""
        self._words[_Word.ALLOWED] = connections

    def allowed(self) -> int:
        """Return how many connections the processes that live may hold, each for itself."""
        return sum(words[_Word.ALLOWED] for words in self._all_words)

    def yields(self) -> bool:
        """Return whether the next connection should be another process's.

        One that serves and holds clearly fewer; but not those that have taken none since this was
        last answered with yes: they are busy, or stuck, and nobody shall wait for them.
        """
        mine = self._words[_Word.CONNECTIONS]
        few = mine - AHEAD - mine // AHEAD_PART
        if few <= 0:
            return False
        behind = {
            other: held
            for other in self._others
            if (words := self._all_words[other])[_Word.SERVING]
            and (held := words[_Word.CONNECTIONS]) < few
        }
        if behind.items() <= self._yielded_to.items():
            return False
        self._yielded_to = behind
        return True

    def write(self, snapshot: Snapshot) -> None:
        """Show the others what this process counts; raise ValueError when it is too large."""
        data = ujson.dumps(snapshot).encode()
        if len(data) > SNAPSHOT_MAX_BYTES:
            raise ValueError(f"a snapshot of {len(data)} bytes, {SNAPSHOT_MAX_BYTES} are the most")
        version = self._words[_Word.SNAPSHOT] + 1
        half = self._half(self.index, version)
        struct.pack_into("=II", half, 0, len(data), zlib.crc32(data))
        half[_WORD_BYTES : _WORD_BYTES + len(data)] = data
        self._words[_Word.SNAPSHOT] = version
        self._words[_Word.ALIVE] = True

    def read_mine(self) -> Snapshot:
        """Return what this process, or the one before it in its place, showed last."""
        return self._snapshot(self.index)

    def read_others(self) -> list[tuple[Snapshot, bool]]:
        """Return what each other process showed last, and whether it is alive."""
        return [
            (self._snapshot(other), bool(self._all_words[other][_Word.ALIVE]))
            for other in self._others
        ]

    def _snapshot(self, index: int) -> Snapshot:
        for _ in range(3):
            version = self._all_words[index][_Word.SNAPSHOT]
            if not version:
                return {}
            half = self._half(index, version)
            length, crc = struct.unpack_from("=II", half)
            data = bytes(half[_WORD_BYTES : _WORD_BYTES + min(length, SNAPSHOT_MAX_BYTES)])
            if zlib.crc32(data) == crc:
                self._read[index] = ujson.loads(data)
                break
            # Its writer came round twice while we read: it has a newer one by now.
        return self._read.get(index, {})

    def _half(self, index: int, version: int) -> memoryview:
        return self._snapshots[index][version % 2 * _HALF_BYTES :][:_HALF_BYTES]
