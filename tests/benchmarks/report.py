"""What a run found, for people (a table in Markdown) and for programs (JSON)."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.scenarios import Result
from benchmarks.servers import SERVICE

COLUMNS = (
    *("scenario", "server", "verdict", "seconds", "per s", "server µs", "ratio", "PostgreSQL µs"),
    *("p50 ms", "p95 ms", "p99 ms", "KiB/conn", "connect µs", "connect s", "peak MiB", "load CPU"),
)
#: What only programs want to know.
HIDDEN = ("received_bytes", "publish_requests", "history")
#: What the columns mean, under the table.
LEGEND = """\
per s: deliveries, in G labels accepted. server µs: CPU of the server's process for each of them;
PostgreSQL µs: that of all its processes beside it. ratio: server µs over the service's in the same
row of scenarios. p50…p99: from right before publishing to reading, in G from a POST to its answer.
KiB/conn: resident memory of the server for each idle connection; kernel buffers are not in it.
connect µs: server CPU for each connection; in D, E and S with all that it then received.
S: until the last of the readers was told that its snapshot is complete.
load CPU: share of the load's core; near 100 % the load was the limit."""


def machine(server_core: int, load_core: int) -> dict[str, Any]:
    """Where this ran."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "server_core": server_core,
        "load_core": load_core,
        "linux": platform.release(),
        "python": platform.python_version(),
    }


def document(
    command: str, size: str, where: dict[str, Any], results: list[Result]
) -> dict[str, Any]:
    """All of a run."""
    return {
        "command": command,
        "size": size,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": where,
        "results": [{**result.as_json(), "ratio": ratio(result, results)} for result in results],
    }


def ratio(result: Result, results: list[Result]) -> float | None:
    """How much more CPU this server took for each unit than the service."""
    for other in results:
        same = (other.scenario, other.variant) == (result.scenario, result.variant)
        if same and other.server == SERVICE and other.server_us and result.server_us:
            return result.server_us / other.server_us
    return None


def table(results: list[Result]) -> str:
    """The table, and below it what was wrong or left out."""
    rows = [COLUMNS, *(_row(result, results) for result in results if result.verdict != "left out")]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    lines = [line(rows[0]), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    lines += [line(row) for row in rows[1:]]
    lines += ["", LEGEND]
    notes = [f"- {_name(result)}: {said}" for result in results if (said := _said(result))]
    return "\n".join([*lines, *([""] if notes else []), *dict.fromkeys(notes)]) + "\n"


def _name(result: Result) -> str:
    return " ".join(filter(None, (result.scenario, result.variant, result.server)))


def _said(result: Result) -> str:
    said = [*result.problems]
    if result.verdict == "left out":
        said.insert(0, "left out")
    said += [f"{key} {value}" for key, value in result.more.items() if value and key not in HIDDEN]
    if result.scenario in ("D", "S") and result.database_cpu_seconds is not None:
        said.append(f"PostgreSQL {result.database_cpu_seconds:.2f} s in all")
    return "; ".join(said)


def _row(result: Result, results: list[Result]) -> tuple[str, ...]:
    latency = result.latency_ms or {}
    return (
        f"{result.scenario}: {result.variant}",
        result.server,
        result.verdict,
        _number(result.seconds),
        _number(result.rate),
        _number(result.server_us),
        _number(ratio(result, results), "×"),
        _number(result.database_us),
        *(_number(latency.get(name)) for name in ("p50", "p95", "p99")),
        _number(result.idle_kib),
        _number(result.connect_us),
        _number(result.connect_seconds),
        _number(result.peak_mib),
        _number(None if result.load_cpu is None else result.load_cpu * 100, " %"),
    )


def _number(value: float | None, unit: str = "") -> str:
    """Three digits that say something; a dash for what was not measured."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}{unit}"
    return f"{float(f'{value:.3g}'):g}{unit}"


def write(folder: Path, found: dict[str, Any], text: str) -> None:
    """Put both into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    head = f"`{found['command']}` · {found['date']} · size {found['size']}\n\n"
    (folder / "results.md").write_text(head + text)
