"""What Prometheus reads, by its own parser; and that what is declared is counted."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import Metric, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import sse_labels
from sse_labels.metrics import COUNTERS, FANOUT_BUCKETS, GAUGES, Metrics, render

PREFIX = "sse_labels_"
FDS = ("open_fds", "max_fds")


def scrape(metrics: Metrics) -> dict[str, Metric]:
    """The families by name, as Prometheus would store them."""
    families = list(text_string_to_metric_families(render([metrics.numbers()]).decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {family.name: family for family in families}


def value(metrics: Metrics, sample: str, **labels: str) -> float:
    found = [
        each.value
        for family in scrape(metrics).values()
        for each in family.samples
        if each.name == PREFIX + sample and each.labels == labels
    ]
    assert len(found) == 1, f"{sample}: {found}"
    return float(found[0])


class TestTheText:
    def test_a_new_process_shows_every_metric_at_zero(self) -> None:
        metrics = Metrics()
        for name in COUNTERS:
            assert value(metrics, f"{name}_total") == 0
        for name in GAUGES:
            assert value(metrics, name) == 0
        assert value(metrics, "commit_to_fanout_seconds_count") == 0

    def test_each_family_has_its_type_and_its_help(self) -> None:
        families = scrape(Metrics())
        for name, text in COUNTERS.items():
            assert (families[PREFIX + name].type, families[PREFIX + name].documentation) == (
                "counter",
                text,
            )
        for name, text in GAUGES.items():
            assert (families[PREFIX + name].type, families[PREFIX + name].documentation) == (
                "gauge",
                text,
            )
        assert families[PREFIX + "commit_to_fanout_seconds"].type == "histogram"

    def test_all_names_begin_alike_or_are_the_process_and_there_are_no_others(self) -> None:
        labelled = {"streams_ended", "requests_refused", "commit_to_fanout_seconds"}
        # Those that Prometheus' libraries give every process.
        process = {
            f"process_{name}"
            for name in (
                "cpu_seconds",
                "max_fds",
                "open_fds",
                "resident_memory_bytes",
                "start_time_seconds",
                "virtual_memory_bytes",
            )
        }
        expected = {PREFIX + name for name in {*COUNTERS, *GAUGES, *labelled}} | process
        # The library adds when the histogram was made, unless the environment forbids it.
        created = {PREFIX + "commit_to_fanout_seconds_created"}
        assert set(scrape(Metrics())) - created == expected

    def test_it_ends_with_a_line_feed_and_is_one_block_per_family(self) -> None:
        text = render([Metrics().numbers()]).decode()
        assert text.endswith("\n")
        helps = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
        assert len(helps) == len(set(helps))


class TestCounting:
    def test_what_is_counted_is_shown(self) -> None:
        metrics = Metrics()
        for number, name in enumerate(sorted(COUNTERS), start=1):
            if name not in ("events_delivered", "bytes_delivered"):
                metrics.count[name] += number
        metrics.events_delivered += 5000
        metrics.bytes_delivered += 2**40
        for number, name in enumerate(sorted(COUNTERS), start=1):
            expected = {"events_delivered": 5000, "bytes_delivered": 2**40}.get(name, number)
            assert value(metrics, f"{name}_total") == expected

    def test_counters_never_go_back_between_two_scrapes(self) -> None:
        metrics = Metrics()
        metrics.events_delivered += 3
        assert value(metrics, "events_delivered_total") == 3
        metrics.events_delivered += 1
        assert value(metrics, "events_delivered_total") == 4

    def test_a_gauge_is_asked_when_somebody_reads_it(self) -> None:
        metrics = Metrics()
        streams = [1, 2, 3]
        metrics.gauges["streams"] = lambda: len(streams)
        assert value(metrics, "streams") == 3
        streams.clear()
        assert value(metrics, "streams") == 0

    def test_a_yes_or_no_is_one_or_zero(self) -> None:
        metrics = Metrics()
        metrics.gauges["following"] = lambda: True
        assert value(metrics, "following") == 1

    def test_ends_and_refusals_are_told_apart_by_their_label(self) -> None:
        metrics = Metrics()
        metrics.streams_ended["ClientGone"] += 2
        metrics.streams_ended["ConsumerTooSlow"] += 1
        metrics.requests_refused["InvalidRequest"] += 4
        assert value(metrics, "streams_ended_total", how="ClientGone") == 2
        assert value(metrics, "streams_ended_total", how="ConsumerTooSlow") == 1
        assert value(metrics, "requests_refused_total", error="InvalidRequest") == 4

    def test_a_label_with_any_text_cannot_forge_a_line(self) -> None:
        metrics = Metrics()
        forged = 'x"} 1\nsse_labels_streams 99\n\\'
        metrics.requests_refused[forged] += 1
        assert value(metrics, "requests_refused_total", error=forged) == 1
        assert value(metrics, "streams") == 0

    @pytest.mark.parametrize("bound", FANOUT_BUCKETS)
    def test_a_sample_falls_into_its_bucket(self, bound: float) -> None:
        metrics = Metrics()
        metrics.fanout_seconds.observe(bound)
        [family] = [
            family
            for name, family in scrape(metrics).items()
            if name.endswith("_seconds") and family.type == "histogram"
        ]
        filled = {
            float(each.labels["le"])
            for each in family.samples
            if each.name.endswith("_bucket") and each.value == 1
        }
        assert min(filled) == bound
        assert value(metrics, "commit_to_fanout_seconds_sum") == bound

    def test_two_processes_in_one_do_not_share_their_counts(self) -> None:
        one, other = Metrics(), Metrics()
        one.count["holes"] += 1
        assert value(other, "holes_total") == 0


#: Opens descriptors until there are no more, and says what /metrics says then.
OUT_OF_DESCRIPTORS = """
import os, resource
from sse_labels import metrics
metrics.PROCESS_SECONDS = 0
shown = metrics.Metrics()
first = metrics.render([shown.numbers()])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
opened = []
try:
    while True:
        opened.append(os.dup(0))
except OSError:
    pass
last = metrics.render([shown.numbers()])
for each in opened:
    os.close(each)
again = metrics.render([shown.numbers()])
print(*(text.decode() for text in (first, last, again)), sep="----", end="")
"""


class TestTheProcess:
    def test_descriptors_are_counted_beside_their_limit(self) -> None:
        found = scrape(Metrics())
        opened, limit = (found[f"process_{name}"].samples[0].value for name in FDS)
        assert 3 <= opened <= limit
        assert limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def test_when_none_is_left_to_count_them_with_all_are_open(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", OUT_OF_DESCRIPTORS],
            cwd=Path(sse_labels.__file__).parents[1],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        first, out, again = (
            {family.name: family for family in text_string_to_metric_families(text)}
            for text in done.stdout.split("----")
        )
        assert first.keys() == out.keys() == again.keys()
        assert [out[f"process_{name}"].samples[0].value for name in FDS] == [64, 64]
        for shown in (first, again):
            assert shown["process_open_fds"].samples[0].value < 20

    def test_they_are_counted_now_and_then_and_not_with_each_scrape(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        look = ProcessCollector.collect

        def counted(self: ProcessCollector) -> Iterable[Metric]:
            asked.append(self)
            return look(self)

        monkeypatch.setattr(ProcessCollector, "collect", counted)
        metrics = Metrics()
        for _ in range(5):
            metrics.numbers()
        assert len(asked) == 1


class TestTheCode:
    """A name that is misspelt would be counted, and never shown."""

    def test_only_declared_counters_are_counted_and_each_is(self) -> None:
        assert keys_of("count") == set(COUNTERS)

    def test_only_declared_gauges_are_set_and_each_is(self) -> None:
        assert keys_of("gauges") == set(GAUGES)


def keys_of(attribute: str) -> set[str]:
    """All constant keys that any module uses as `….<attribute>[key]`."""
    found = set()
    for file in Path(sse_labels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Subscript(
                    value=ast.Attribute(attr=name), slice=ast.Constant(value=str(key))
                ) if name == attribute:
                    found.add(key)
    return found
