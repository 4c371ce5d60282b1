"""Alerts and dashboard: by Prometheus' own tool, and by a real Prometheus at a real server."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.database import TestDatabase
from support.program import QUICK_SERVER, REPOSITORY, Program, free_port, running
from support.prometheus import Prometheus, prometheus
from support.server import LABEL, Server, away
from support.system import program

MONITORING = REPOSITORY / "sse_labels" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
TEXT = ALERTS.read_text()
NAMES = re.findall(r"- alert: (\w+)", TEXT)
EXPRESSIONS = dict(zip(NAMES, re.findall(r" expr: (.+)", TEXT), strict=True))
RUNBOOKS = dict(zip(NAMES, re.findall(r' runbook: "(.+)"', TEXT), strict=True))

DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
TARGETS = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]
#: What Grafana writes in the place of variables: all servers, and a time for rates.
VARIABLES = {"$instance": ".+", "$__rate_interval": "20s"}

TOKEN = "a-token-for-tests"


def series(name: str, **labels: str) -> str:
    """One series of a server called `a`, as promtool writes it."""
    given = {"job": "sse_labels", "instance": "a", **labels}
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in given.items()) + "}"


@dataclass
class Case:
    """What an alert is to do: series as promtool writes them, a value for each minute."""

    fault: dict[str, str]
    #: Close to the fault, and none.
    quiet: dict[str, str]
    #: The first minute at which it fires, and what it says then.
    minute: int
    severity: str
    summary: str
    labels: tuple[str, ...] = ("instance", "job")


def one(name: str, fault: str, quiet: str, *rest: Any, **labels: str) -> Case:
    """A case of a single series."""
    return Case({series(name, **labels): fault}, {series(name, **labels): quiet}, *rest)


CASES = {
    "SseLabelsDown": one(
        "up", "1x4 0x30", "1x4 0 1x30", 6, "critical", "a does not answer /metrics."
    ),
    "SseLabelsNotFollowing": one(
        "sse_labels_following", "1x4 0x30", "1x4 0 1x30", 6, "critical",
        "a does not follow the table: no label is streamed.",
    ),
    "SseLabelsHeldBack": one(
        "sse_labels_hole_age_seconds", "0+30x30", "60x30", 3, "warning",
        "Labels wait for an open transaction on a since 1m 30s.",
    ),
    "SseLabelsBrokenPromise": one(
        "sse_labels_broken_promises_total", "0x5 1x30", "1x30", 6, "critical",
        "A promise of the service did not hold on a.",
    ),
    "SseLabelsConsumersTooSlow": one(
        "sse_labels_queue_overflows_total", "0+7x30", "0+6x30", 10, "warning",
        "More than six consumers a minute are cut for being too slow on a.",
    ),
    "SseLabelsRefusing": Case(
        {
            series("sse_labels_requests_refused_total", error="NotReady"): "0+4x30",
            series("sse_labels_requests_refused_total", error="TooManyConnections"): "0+4x30",
        },
        {
            series("sse_labels_requests_refused_total", error="NotReady"): "0+6x30",
            series("sse_labels_requests_refused_total", error="InvalidRequest"): "0+600x30",
        },
        9, "warning", "a refuses requests that are not wrong.", ("instance",),
    ),
    "SseLabelsConnectionsNearLimit": Case(
        {
            series("sse_labels_connections"): "10x30",
            series("sse_labels_connections_limit"): "100x30",
            series("sse_labels_streams"): "0 9x30",
            series("sse_labels_streams_limit"): "10x30",
        },
        {
            series("sse_labels_connections"): "80x30",
            series("sse_labels_connections_limit"): "100x30",
            series("sse_labels_streams"): "8x30",
            series("sse_labels_streams_limit"): "10x30",
        },
        6, "warning", "90% of the connections or streams that a may hold are open.",
    ),
    "SseLabelsDescriptorsNearLimit": Case(
        {
            series("process_open_fds", worker="1"): "100x30",
            series("process_max_fds", worker="1"): "1000x30",
            series("process_open_fds", worker="2"): "950x30",
            series("process_max_fds", worker="2"): "1000x30",
        },
        {
            series("process_open_fds"): "90x30",
            series("process_max_fds"): "100x30",
            # Another program on that machine.
            series("process_open_fds", job="other"): "100x30",
            series("process_max_fds", job="other"): "100x30",
        },
        5, "warning", "95% of the files that a may open are open.",
        ("instance", "job", "worker=2"),
    ),
    "SseLabelsPublishRefused": one(
        "sse_labels_labels_refused_total", "0+61x30", "0+60x30", 10, "warning",
        "A publisher sends labels that are refused by a.",
    ),
    "SseLabelsDatabaseFlapping": one(
        "sse_labels_database_reconnects_total", "0x5 11x30", "0x5 10x30", 6, "warning",
        "a keeps losing its database.",
    ),
    "SseLabelsRetentionBehind": Case(
        {
            series("sse_labels_sweep_age_seconds", worker="1"): "0+60x30",
            series("sse_labels_sweep_age_seconds", worker="2"): "30+60x30",
        },
        {
            # Another worker deletes.
            series("sse_labels_sweep_age_seconds", worker="1"): "0+60x30",
            series("sse_labels_sweep_age_seconds", worker="2"): "900x30",
        },
        16, "warning", "Retention on a has not got through for 16m 0s.",
    ),
    "SseLabelsWorkersRestarting": one(
        "sse_labels_workers_replaced_total", "0x5 4x30", "0x5 3x30", 6, "warning",
        "Workers of a die again and again.",
    ),
}  # fmt: skip


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_what_prometheus_takes() -> None:
    promtool("check", "rules", ALERTS)
    assert list(CASES) == NAMES


def rule_tests(name: str, case: Case) -> Iterator[dict[str, Any]]:
    """As promtool takes them: the fault fires the alert, and what is close to it does not."""
    known = {"instance": "a", "job": "sse_labels", "severity": case.severity}
    labels = {
        key: value or known[key]
        for key, _, value in (each.partition("=") for each in (*case.labels, "severity"))
    }
    # All of an alert's labels and annotations are compared.
    fires = {
        "exp_labels": labels,
        "exp_annotations": {"summary": case.summary, "runbook": RUNBOOKS[name]},
    }
    quiet: dict[int, list[Any]] = {minute: [] for minute in range(31)}
    for values, expected in (
        (case.fault, {case.minute - 1: [], case.minute: [fires]}),
        (case.quiet, quiet),
    ):
        yield {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": each, "values": of} for each, of in values.items()],
            "alert_rule_test": [
                {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": alerts}
                for minute, alerts in expected.items()
            ],
        }


def test_each_alert_fires_with_its_fault_says_so_and_not_without(tmp_path: Path) -> None:
    tests = [each for name, case in CASES.items() for each in rule_tests(name, case)]
    file = tmp_path / "test.yml"
    # JSON is YAML.
    file.write_text(
        json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests})
    )
    promtool("test", "rules", file)


def shown_names(text: str) -> dict[str, str]:
    """The names of all samples that a text of /metrics has, or could have, by their type."""
    return {
        name: family.type
        for family in text_string_to_metric_families(text)
        for name in (
            {f"{family.name}_total"}  # before the first of those with labels there is none
            if family.type == "counter"
            else {sample.name for sample in family.samples}
        )
    }


@pytest.fixture
async def names(server: Server) -> dict[str, str]:
    async with httpx.AsyncClient(verify=False) as client:
        found = shown_names((await client.get(f"{server.url}/metrics")).text)
    # Prometheus' own.
    return {**found, "up": "gauge"}


def check_names(expression: str, names: dict[str, str]) -> None:
    """Fail for a metric that the server has not, and for rates of what is no counter."""
    used = set(re.findall(r"\b(?:sse_labels_|process_)\w+|\bup\b", expression))
    assert used, expression
    assert used <= names.keys(), (expression, used - names.keys())
    rated = set(re.findall(r"\b(?:rate|increase)\((\w+)", expression))
    counted = {name for name in used if names[name] != "gauge"}
    assert rated == counted, f"rate() of a gauge, or a counter without: {expression}"


def test_every_metric_of_alerts_and_dashboard_is_one_of_the_server(names: dict[str, str]) -> None:
    for expression in (*EXPRESSIONS.values(), *TARGETS):
        check_names(expression, names)


def test_check_of_names_finds_wrong_ones(names: dict[str, str]) -> None:
    for expression in (
        "rate(sse_labels_streams_total[5m])",  # a gauge has no such name, …
        "rate(sse_labels_streams[5m])",  # … and no rate
        "sse_labels_holes_total",
        "sse_labels_holes",
        "sse_labels_commit_to_fanout_seconds",
        "sse_labels_misspelt",
    ):
        with pytest.raises(AssertionError):
            check_names(expression, names)


def test_errors_that_alerts_name_exist() -> None:
    from sse_labels import errors

    known = {getattr(each, "name", None) for each in vars(errors).values()}
    [listed] = re.findall(r'error=~"([\w|]+)"', TEXT)
    assert set(listed.split("|")) - known == {"InternalServerError"}


@pytest.fixture
def shortened(tmp_path: Path) -> Path:
    """The file of alerts as it is shipped, but that none waits: `for` some minutes becomes 0."""
    text, count = re.subn(r"^(        for: )\d+m$", r"\g<1>0s", TEXT, flags=re.MULTILINE)
    assert count == TEXT.count("for: ") > 0
    path = tmp_path / "shortened.yml"
    path.write_text(text)
    return path


@contextlib.contextmanager
def watched(
    database: TestDatabase, directory: Path, rules: Path, *arguments: str
) -> Iterator[tuple[Program, str, Prometheus]]:
    """A server, its address, and a Prometheus that has scraped it."""
    env = {"SSE_LABELS_PUBLISH_TOKEN": TOKEN}
    port = free_port()
    place = (f"--port={port}", "--dsn", database.dsn)
    with (
        prometheus(directory, f"127.0.0.1:{port}", rules) as watching,
        running("serve", *QUICK_SERVER, *place, *arguments, env=env) as server,
    ):
        url = server.url()
        watching.until_scraped()
        yield server, url, watching


def test_real_faults_fire_their_alerts_in_a_real_prometheus(
    database: TestDatabase, tmp_path: Path, shortened: Path
) -> None:
    limit = "--max-connections=20"
    with watched(database, tmp_path, shortened, limit) as (server, url, watching):
        address = httpx.URL(url)
        instance = address.netloc.decode()

        def fires(name: str) -> Callable[[], bool]:
            return lambda: name in watching.firing()

        watching.until(lambda: {rule["health"] for rule in watching.rules()} == {"ok"}, "all rules")
        watching.until(lambda: watching.firing() == {}, "silence")

        near = "SseLabelsConnectionsNearLimit"
        with contextlib.ExitStack() as stack:

            def connect(count: int) -> None:
                for _ in range(count):
                    one = socket.create_connection((address.host, address.port or 0))
                    stack.callback(one.close)

            # And the one that Prometheus keeps.
            connect(17)
            watching.until(fires(near), near)
            connect(5)
            alert = watching.firing()[near]
            assert alert["labels"] == {
                "alertname": near, "instance": instance, "job": "sse_labels", "severity": "warning",
            }  # fmt: skip
            assert alert["annotations"] == {
                "summary": f"90% of the connections or streams that {instance} may hold are open.",
                "runbook": RUNBOOKS[near],
            }

        with away(database):
            watching.until(fires("SseLabelsNotFollowing"), "SseLabelsNotFollowing")
            # Each asks for what is there: without its threshold it gives numbers. Some were
            # refused by now, which is counted under a label.
            for name, expression in EXPRESSIONS.items():
                watched_for, count = re.subn(r" (?:==|>) [\d.]+", "", expression)
                assert count >= 1
                watching.until(lambda asked=watched_for: watching.has_numbers(asked), name)

        server.send(signal.SIGKILL)
        # Whatever fired before was of a server that is no more.
        watching.until(lambda: list(watching.firing()) == ["SseLabelsDown"], "SseLabelsDown alone")
        down = watching.firing()["SseLabelsDown"]
        assert down["labels"]["severity"] == "critical"
        assert down["annotations"]["summary"] == f"{instance} does not answer /metrics."

        rules = watching.rules()
        assert [rule["name"] for rule in rules] == NAMES
        assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}


def test_every_panel_of_the_dashboard_has_numbers_in_a_real_prometheus(
    database: TestDatabase, tmp_path: Path
) -> None:
    arguments = ("--workers=2", "--retention-max-labels=100000")
    with watched(database, tmp_path, ALERTS, *arguments) as (_, url, watching):
        with (
            httpx.Client(base_url=url, timeout=20, verify=False) as client,
            client.stream("GET", "/stream") as live,
        ):
            assert live.status_code == 200

            def happen() -> None:
                """A bit of all that panels show; without any, there is nothing to show."""
                headers = {"Authorization": f"Bearer {TOKEN}"}
                for labels, status in (([LABEL], 201), ([{}], 422)):
                    answer = client.post("/labels", json={"labels": labels}, headers=headers)
                    assert answer.status_code == status
                with client.stream("GET", "/stream", params={"cursor": 0}) as ended:
                    next(ended.iter_bytes())

            def has_numbers(expression: str) -> bool:
                happen()
                return watching.has_numbers(expression)

            for title, panel in PANELS.items():
                for target in panel["targets"]:
                    expression = target["expr"]
                    for variable, value in VARIABLES.items():
                        expression = expression.replace(variable, value)
                    assert "$" not in expression
                    watching.until(lambda asked=expression: has_numbers(asked), title)
                    # A label that is missing would leave a hole in the legend.
                    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                        assert all(labels.get(label) for labels, _ in watching.query(expression))

        [variable] = (
            each for each in DASHBOARD["templating"]["list"] if each["type"] == "query"
        )  # fmt: skip
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked is not None
        values = watching.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})
        assert values == [httpx.URL(url).netloc.decode()]


def test_dashboard_is_whole() -> None:
    """What its file says of itself; no Grafana draws it here, Debian has none."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = DASHBOARD["templating"]["list"]
    assert [(each["name"], each["type"]) for each in variables] == [
        ("datasource", "datasource"),
        ("instance", "query"),
    ]
    assert variables[0]["query"] == "prometheus"
    assert variables[1]["datasource"] == source
    assert len(PANELS) == len(DASHBOARD["panels"])
    assert len({panel["id"] for panel in PANELS.values()}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for title, panel in PANELS.items():
        assert panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["datasource"] == source
        place = panel["gridPos"]
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{title} covers another panel"
        taken |= cells
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert target["legendFormat"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert set(re.findall(r"\$\w+", json.dumps(panel["targets"]))) <= VARIABLES.keys()
