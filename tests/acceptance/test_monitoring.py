"""The example alerts, by Prometheus' own tool, and against the real /metrics."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.server import Server
from support.system import program

ALERTS = Path(__file__).parents[2] / "sse_labels" / "monitoring" / "alerts.yml"
NAMES = re.findall(r"- alert: (\w+)", ALERTS.read_text())
#: By alert: its series, as promtool writes them, and the minute at which it fires.
SERIES = {
    "SseLabelsDown": ('up{job="sse_labels",instance="a"}', "1x5 0x30", "1x60"),
    "SseLabelsNotFollowing": ('sse_labels_following{instance="a"}', "1x5 0x30", "1x60"),
    "SseLabelsHeldBack": ('sse_labels_hole_age_seconds{instance="a"}', "0+60x30", "30x60"),
    "SseLabelsBrokenPromise": (
        'sse_labels_broken_promises_total{instance="a"}', "0x5 1x30", "1x60",
    ),
    "SseLabelsConsumersTooSlow": (
        'sse_labels_queue_overflows_total{instance="a"}', "0+60x60", "0+1x60",
    ),
    "SseLabelsRefusing": (
        'sse_labels_requests_refused_total{instance="a",error="NotReady"}', "0+60x60", "0+1x60",
    ),
    "SseLabelsPublishRefused": (
        'sse_labels_labels_refused_total{instance="a"}', "0+600x60", "0+6x60",
    ),
    "SseLabelsDatabaseFlapping": (
        'sse_labels_database_reconnects_total{instance="a"}', "0+5x60", "0x5 2x60",
    ),
    "SseLabelsWorkersRestarting": (
        'sse_labels_workers_replaced_total{instance="a"}', "0+1x60", "0x5 1x60",
    ),
}  # fmt: skip


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def firing(tmp_path: Path, alert: str, values: str) -> bool:
    """Whether the alert fires at some minute up to the twentieth."""
    rules = tmp_path / "test.yml"
    # Asked of the series that Prometheus itself keeps of its alerts.
    rules.write_text(
        f"rule_files: ['{ALERTS}']\nevaluation_interval: 1m\ntests:\n- interval: 1m\n"
        f"  input_series:\n  - series: '{SERIES[alert][0]}'\n    values: '{values}'\n"
        "  promql_expr_test:\n"
        f'  - expr: \'count(ALERTS{{alertname="{alert}",alertstate="firing"}})\'\n'
        "    eval_time: 15m\n    exp_samples: [{labels: '{}', value: 1}]\n"
    )
    done = subprocess.run(
        [program("promtool"), "test", "rules", rules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "got: nil" in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
    return done.returncode == 0


def test_rules_are_what_prometheus_takes() -> None:
    promtool("check", "rules", ALERTS)
    assert list(SERIES) == NAMES


@pytest.mark.parametrize("alert", NAMES)
def test_alert_fires_with_its_fault_and_not_without(tmp_path: Path, alert: str) -> None:
    _, fault, quiet = SERIES[alert]
    assert firing(tmp_path, alert, fault)
    assert not firing(tmp_path, alert, quiet)


async def test_every_metric_of_an_alert_is_one_of_the_server(server: Server) -> None:
    used = set(re.findall(r"\bsse_labels_\w+", " ".join(
        re.findall(r"expr: (.*)", ALERTS.read_text())
    ))) - {"sse_labels_"}  # fmt: skip
    async with httpx.AsyncClient(verify=False) as client:
        text = (await client.get(f"{server.url}/metrics")).text
    # Families with labels have no sample before the first: their names are known all the same.
    shown = {
        name
        for family in text_string_to_metric_families(text)
        for name in (family.name, f"{family.name}_total", *(s.name for s in family.samples))
    }
    assert used <= shown
