"""The metrics of several processes as one.

Promises: what is counted is added up, what a process that ended had counted included; an
amount (streams, bytes) is added up over the processes that live; the state of a sequencer
is shown for each process, under the label `worker`: added up, or the best of them, it
would hide the one that lags.
Does not belong here: which metrics there are (`metrics`), where snapshots are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.registry import Collector

#: By family: its samples as (name, labels, value). JSON makes lists of the tuples.
Snapshot = dict[str, list[tuple[str, dict[str, str], float]]]


class Sums(Collector):
    """The families of one process with the numbers of all."""

    def __init__(self, mine: Iterable[Metric], snapshots: Sequence[Snapshot]) -> None:
        """`mine` says which families there are; `snapshots`, one of them ours, are added up."""
        self._mine = mine
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        """Yield each family once."""
        sums = add(self._snapshots)
        for family in self._mine:
            summed = Metric(family.name, family.documentation, family.type)
            for name, labels, value in sums.get(family.name, []):
                summed.add_sample(name, labels, value)
            yield summed


def snapshot(families: Iterable[Metric], worker: str, per_worker: frozenset[str]) -> Snapshot:
    """Return the numbers of one process; those of `per_worker` families get its label."""
    numbers: Snapshot = {}
    for family in families:
        own = {"worker": worker} if family.name in per_worker else {}
        numbers[family.name] = [
            (sample.name, {**sample.labels, **own}, sample.value)
            for sample in family.samples
            # When a histogram began is no number to add up.
            if not sample.name.endswith("_created")
        ]
    return numbers


def counted(families: Iterable[Metric], snapshot: Snapshot) -> Snapshot:
    """Return what is left of `snapshot` when its process has ended: all but gauges."""
    gauges = {family.name for family in families if family.type == "gauge"}
    return {name: samples for name, samples in snapshot.items() if name not in gauges}


def add(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Add up what has the same name and labels."""
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for one in snapshots:
        for family, samples in one.items():
            of_family = sums.setdefault(family, {})
            for name, labels, value in samples:
                key = (name, tuple(labels.items()))
                of_family[key] = of_family.get(key, 0) + value
    return {
        family: [(name, dict(labels), value) for (name, labels), value in of_family.items()]
        for family, of_family in sums.items()
    }
