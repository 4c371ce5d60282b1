"""What this process counts, as Prometheus reads it.

Promises: counting costs an integer addition, because the fan-out counts for
every delivery; the text form is made when somebody asks for it.
Does not belong here: decisions. Nothing reads a metric to act on it.

Of several workers each one's numbers are shown, under the label `worker`. A sum would fall when a
worker dies, and Prometheus takes a counter that falls for one that began again at 0: `rate` would
count once more all that the other workers have counted.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

#: Seconds: from an idle server's to a label that a long transaction held back.
FANOUT_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 300),
)

COUNTERS = {
    "events_delivered": "Events written to consumers, each counted once per consumer.",
    "bytes_delivered": "Bytes written to consumers' connections, without HTTP's headers.",
    "events_followed": "Events that the sequencer took from the table.",
    "chunks_followed": "Chunks that the sequencer made of them.",
    "unsigned_withheld": "New labels without a signature that were withheld.",
    "signatures_invalid": "New labels whose signature is wrong, by --source-keys-file.",
    "signatures_unchecked": "New labels that came faster than signatures can be checked.",
    "backfill_events": "Events read from the database, or the page cache, for backfills.",
    "backfill_pages": "Pages read from the database for backfills.",
    "backfill_page_hits": "Pages that a backfill found in the page cache.",
    "ring_hits": "Streams that caught up from the ring alone.",
    "expiries_told": "Expired labels told to consumers, each counted once per consumer.",
    "queue_overflows": "Consumers that were too slow for their outbox.",
    "publish_requests": "POST /labels that were answered with seqs, repeated ones included.",
    "labels_published": "Labels that POST /labels answered with seqs, repeated requests included.",
    "labels_deleted": "Labels deleted by retention.",
    "labels_refused": "Labels refused by POST /labels.",
    "log_lines_left_out": "Log lines that were not written: one address caused too many.",
    "holes": "Holes that made the sequencer wait for open transactions.",
    "database_reconnects": "Connections to the database that were lost and made anew.",
    "broken_promises": "Times that a promise of this service did not hold.",
    "workers_replaced": "Worker processes that ended and were replaced.",
    "embedded_restarts": "Times that the embedded PostgreSQL had died and was restarted.",
}
GAUGES = {
    "head_seq": "The newest settled seq.",
    "floor_seq": "The oldest seq still kept.",
    "connections": "TCP connections open now, streams included.",
    "connections_limit": "TCP connections that may be open at the same time.",
    "streams": "Streams open now.",
    "streams_limit": "Streams that may be open at the same time.",
    "streams_backfilling": "Streams that are reading history now.",
    "holes_open": "Whether the sequencer waits for a hole: 1 or 0.",
    "hole_age_seconds": "How long it has been waiting.",
    "ring_bytes": "Memory held by the ring.",
    "ring_chunks": "Chunks in the ring.",
    "expiries_scheduled": "Labels that expire within the hour, while streams ask for that.",
    "following": "Whether the sequencer follows the table: 1 or 0.",
    "sweep_age_seconds": "Seconds since retention had deleted all that is beyond its limits, or "
    "since the start; 0 without limits.",
}
DESCRIPTORS = ("process_open_fds", "process_max_fds")
#: Counting 16,000 descriptors takes 10 ms, and anybody may ask as often as they like.
PROCESS_SECONDS = 5.0

#: A family as JSON has it: name, help, type, and its samples as name, labels, value.
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


class Metrics(Collector):
    """Plain numbers, read by Prometheus' client library when it collects.

    `count` holds the counters by name; a gauge is a function that its owner sets.
    """

    def __init__(self, worker: int | None = None) -> None:
        """`worker` says which of several processes this is, from 1."""
        self.count: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.gauges: dict[str, Callable[[], float]] = {}
        self.streams_ended: Counter[str] = Counter()
        self.requests_refused: Counter[str] = Counter()
        # Read and written for every delivery: attributes, not keys.
        self.events_delivered = 0
        self.bytes_delivered = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(ProcessMetrics())
        self.fanout_seconds = Histogram(
            "sse_labels_commit_to_fanout_seconds",
            "From a label's commit to its hand-over to all consumers, sampled, by the database's "
            "clock; needs track_commit_timestamp=on there.",
            buckets=FANOUT_BUCKETS,
            registry=self._registry,
        )
        self._worker = {} if worker is None else {"worker": str(worker)}

    def numbers(self) -> list[Family]:
        """Return what this process has counted, for `render`, as JSON can hold it."""
        return [
            (family.name, family.documentation, family.type, [
                (sample.name, {**sample.labels, **self._worker}, sample.value)
                for sample in family.samples
            ])
            for family in self._registry.collect()
        ]  # fmt: skip

    def collect(self) -> Iterator[Any]:
        """Yield all families but the histogram; called by the registry."""
        self.count["events_delivered"] = self.events_delivered
        self.count["bytes_delivered"] = self.bytes_delivered
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"sse_labels_{name}", text, value=self.count[name])
        for name, text in GAUGES.items():
            read = self.gauges.get(name)
            yield GaugeMetricFamily(f"sse_labels_{name}", text, value=read() if read else 0)
        ended = CounterMetricFamily(
            "sse_labels_streams_ended", "Streams that ended, by how.", labels=["how"]
        )
        for how, number in sorted(self.streams_ended.items()):
            ended.add_metric([how], number)
        yield ended
        refused = CounterMetricFamily(
            "sse_labels_requests_refused", "Requests answered with an error.", labels=["error"]
        )
        for error, number in sorted(self.requests_refused.items()):
            refused.add_metric([error], number)
        yield refused


class Workers(Collector):
    """The families of several processes, each family once."""

    def __init__(self, workers: Iterable[Iterable[Family]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        """Return them; called by the registry."""
        families: dict[str, Metric] = {}
        for name, text, kind, samples in chain.from_iterable(self._workers):
            family = families.setdefault(name, Metric(name, text, kind))
            for sample in samples:
                family.add_sample(*sample)
        return families.values()


def render(workers: Iterable[Iterable[Family]]) -> bytes:
    """Return the numbers of all workers in the text exposition format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Workers(workers))
    return generate_latest(registry)


class ProcessMetrics(ProcessCollector):
    """Memory, time and descriptors of this process, as the library names them."""

    def __init__(self) -> None:
        super().__init__(registry=None)
        self._found: list[Metric] = []
        self._look_at = 0.0

    def collect(self) -> Iterable[Metric]:
        """Return what the kernel said last, at most `PROCESS_SECONDS` ago."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + PROCESS_SECONDS
            found = list(super().collect())
            if self._found and not any(each.name in DESCRIPTORS for each in found):
                # None is left to look with: an alert must not go away because of that.
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                found = [each for each in self._found if each.name not in DESCRIPTORS]
                found += [GaugeMetricFamily(name, "All.", value=limit) for name in DESCRIPTORS]
            self._found = found
        return self._found
