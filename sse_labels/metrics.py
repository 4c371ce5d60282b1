"""Metrics: the counters and gauges of this process, in Prometheus' format.

Promises: counting costs one integer addition, because the fan-out counts every delivery. The text
form is made only when a client asks for it. No code reads a metric to decide something.

With several workers, the numbers of each worker are shown separately, with the label `worker`. A
sum would fall when a worker dies. Prometheus takes a falling counter for one that began again at 0:
`rate` would count all events of the other workers again.
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

#: Seconds: from the time on an idle server to that of a label behind a long transaction.
FANOUT_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 300),
)

COUNTERS = {
    "events_delivered": "Events written to consumers, each counted once per consumer.",
    "bytes_delivered": "Bytes written to consumers' connections, without HTTP's headers.",
    "events_followed": "Events that the sequencer took from the table.",
    "chunks_followed": "Chunks that the sequencer made of these events.",
    "unsigned_withheld": "New labels without a signature that were withheld.",
    "signatures_invalid": "New labels whose signature is wrong, by the keys of --source-keys-file.",
    "signatures_unchecked": "New labels that came faster than signatures can be checked.",
    "backfill_events": "Events read from the database, or the page cache, for backfills.",
    "backfill_pages": "Pages read from the database for backfills.",
    "backfill_page_hits": "Pages that a backfill found in the page cache.",
    "ring_hits": "Streams that caught up from the ring alone.",
    "expiries_told": "Expired labels reported to consumers, each counted once per consumer.",
    "queue_overflows": "Consumers that were too slow for their outbox.",
    "publish_requests": "POST /labels that were answered with seqs, repeated ones included.",
    "labels_published": "Labels that POST /labels answered with seqs, repeated requests included.",
    "labels_deleted": "Labels deleted by retention.",
    "labels_refused": "Labels refused by POST /labels.",
    "log_lines_left_out": "Log lines that were not written: one address caused too many.",
    "holes": "Holes that made the sequencer wait for open transactions.",
    "database_reconnects": "Connections to the database that were lost and replaced.",
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
    "hole_age_seconds": "Seconds since the sequencer began to wait for the hole; 0 without one.",
    "ring_bytes": "Memory held by the ring.",
    "ring_chunks": "Chunks in the ring.",
    "expiries_scheduled": "Labels that expire within the hour, while streams ask for notices.",
    "following": "Whether the sequencer follows the table: 1 or 0.",
    "sweep_age_seconds": "Seconds since retention had deleted all labels beyond its limits, or "
    "since the start; 0 without limits.",
}
DESCRIPTORS = ("process_open_fds", "process_max_fds")
#: Process numbers are read at most this often: counting 16,000 descriptors takes 10 ms, and any
#: client may ask at any rate.
PROCESS_SECONDS = 5.0

#: A family in a form for JSON: name, help, type, and its samples as name, labels, value.
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


class Metrics(Collector):
    """Plain numbers, which Prometheus' client library reads when it collects.

    `count` holds the counters by name. A gauge is a function that its owner sets.
    """

    def __init__(self, worker: int | None = None) -> None:
        """`worker` is the number of this process among several, from 1."""
        self.count: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.gauges: dict[str, Callable[[], float]] = {}
        self.streams_ended: Counter[str] = Counter()
        self.requests_refused: Counter[str] = Counter()
        # Written for every delivery: attributes are faster than keys.
        self.events_delivered = 0
        self.bytes_delivered = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(ProcessMetrics())
        self.fanout_seconds = Histogram(
            "sse_labels_commit_to_fanout_seconds",
            "Seconds from a label's commit to its delivery to all consumers, sampled, by the "
            "database's clock; the database needs track_commit_timestamp=on.",
            buckets=FANOUT_BUCKETS,
            registry=self._registry,
        )
        self._worker = {} if worker is None else {"worker": str(worker)}

    def numbers(self) -> list[Family]:
        """Return the numbers of this process for `render`, in a form for JSON."""
        return [
            (family.name, family.documentation, family.type, [
                (sample.name, {**sample.labels, **self._worker}, sample.value)
                for sample in family.samples
            ])
            for family in self._registry.collect()
        ]  # fmt: skip

    def collect(self) -> Iterator[Any]:
        """Yield all families except the histogram. Called by the registry."""
        self.count["events_delivered"] = self.events_delivered
        self.count["bytes_delivered"] = self.bytes_delivered
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"sse_labels_{name}", text, value=self.count[name])
        for name, text in GAUGES.items():
            read = self.gauges.get(name)
            yield GaugeMetricFamily(f"sse_labels_{name}", text, value=read() if read else 0)
        ended = CounterMetricFamily(
            "sse_labels_streams_ended", "Streams that ended, by the reason.", labels=["how"]
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
        """Return the families. Called by the registry."""
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
    """Memory, time and descriptors of this process, with the library's names."""

    def __init__(self) -> None:
        super().__init__(registry=None)
        self._found: list[Metric] = []
        self._next_read = 0.0

    def collect(self) -> Iterable[Metric]:
        """Return the kernel's numbers, at most `PROCESS_SECONDS` old."""
        now = time.monotonic()
        if now >= self._next_read:
            self._next_read = now + PROCESS_SECONDS
            found = list(super().collect())
            if self._found and not any(each.name in DESCRIPTORS for each in found):
                # All descriptors are in use, so none is left to count them. The metrics must not
                # disappear then, because an alert needs them.
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                found = [each for each in self._found if each.name not in DESCRIPTORS]
                found += [GaugeMetricFamily(name, "All.", value=limit) for name in DESCRIPTORS]
            self._found = found
        return self._found
