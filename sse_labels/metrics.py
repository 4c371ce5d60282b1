"""What this process counts, as Prometheus reads it.

Promises: counting costs an integer addition, because the fan-out counts for
every delivery; the text form is made when somebody asks for it.
Stands beside the corridor: every room counts here, this file knows none of them.
Does not belong here: decisions. Nothing reads a metric to act on it. How the numbers of
several processes meet (`shared`).
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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

from sse_labels.shared import Share
from sse_labels.shared.sums import Snapshot, Sums, add, counted, snapshot

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
#: Looked at by every process for itself: `--workers` shows each one's own.
PER_WORKER = frozenset({
    *(f"sse_labels_{name}" for name in (
        "head_seq", "floor_seq", "holes_open", "hole_age_seconds", "following", "sweep_age_seconds",
        "expiries_scheduled",
    )),
    *(f"process_{name}" for name in (
        "open_fds", "max_fds", "resident_memory_bytes", "virtual_memory_bytes",
        "start_time_seconds",
    )),
})  # fmt: skip
#: Known by every process for all: not added up.
OF_ALL = frozenset(
    f"sse_labels_{name}" for name in ("connections_limit", "streams_limit", "embedded_restarts")
)
DESCRIPTORS = ("process_open_fds", "process_max_fds")
#: Counting 16,000 descriptors takes 10 ms, and workers are asked four times a second.
PROCESS_SECONDS = 5.0


class Metrics(Collector):
    """Plain numbers, read by Prometheus' client library when it collects.

    `count` holds the counters by name; a gauge is a function that its owner sets.
    """

    def __init__(self, share: Share | None = None) -> None:
        """With `share` the text says what all processes count, and `show` lets them know."""
        self.count: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.gauges: dict[str, Callable[[], float]] = {}
        self.streams_ended: Counter[str] = Counter()
        self.requests_refused: Counter[str] = Counter()
        # Read and written for every delivery: attributes, not keys.
        self.events_delivered = 0
        self.bytes_delivered = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(Process())
        self.fanout_seconds = Histogram(
            "sse_labels_commit_to_fanout_seconds",
            "From a label's commit to its hand-over to all consumers, sampled, by the database's "
            "clock; needs track_commit_timestamp=on there.",
            buckets=FANOUT_BUCKETS,
            registry=self._registry,
        )
        self._share = share
        #: What those have counted that ended in our place: nothing is to go back.
        self._before: Snapshot = {}
        if share is not None:
            self._before = counted(self._registry.collect(), share.read_mine())

    def render(self) -> bytes:
        """Return the text exposition format, version 0.0.4."""
        if self._share is None:
            return generate_latest(self._registry)
        self.show()
        families = list(self._registry.collect())
        others = [
            numbers if alive else counted(families, numbers)
            for numbers, alive in self._share.read_others()
        ]
        registry = CollectorRegistry(auto_describe=False)
        whole = snapshot([f for f in families if f.name in OF_ALL], "", frozenset())
        registry.register(Sums(families, [self._share.read_mine(), *others, whole]))
        return generate_latest(registry)

    def show(self) -> None:
        """Let the other processes read what this one has counted by now."""
        if self._share is not None:
            families = [each for each in self._registry.collect() if each.name not in OF_ALL]
            mine = snapshot(families, str(self._share.index + 1), PER_WORKER)
            self._share.write(add([mine, self._before]))

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


class Process(ProcessCollector):
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
