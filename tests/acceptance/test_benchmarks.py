"""The benchmarks work: they start, deliver everything, and say so. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.program import REPOSITORY


def run(folder: Path, only: str) -> list[dict[str, Any]]:
    """The results of one scenario, which are all there and of nobody else."""
    command = [
        *(sys.executable, "-m", "benchmarks", "--size", "small", "--only", only),
        *("--peers", "-", "--history", "2000", "--out", str(folder)),
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY / "tests", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "results.json").read_text())
    assert found["size"] == "small"
    assert found["command"] in (folder / "results.md").read_text()
    results: list[dict[str, Any]] = found["results"]
    for each in results:
        assert (each["scenario"], each["server"]) == (only, "service")
        assert each["verdict"] in ("complete", "falls behind"), each["problems"]
        assert each["server_us"] is not None
        assert each["rate"] > 0
    return results


def test_small_benchmark_delivers_everything_and_writes_json(tmp_path: Path) -> None:
    results = run(tmp_path, "D")
    assert [each["variant"] for each in results] == [
        f"2000 stored, {readers} at once" for readers in (1, 5)
    ]
    for each in results:
        assert each["deliveries"] == each["expected"] == 2000 * each["connections"]


def test_small_benchmark_of_snapshots_delivers_what_is_in_force(tmp_path: Path) -> None:
    results = run(tmp_path, "S")
    assert [each["variant"] for each in results] == [
        f"200 in force of 2000 {where}, {readers} at once"
        for where in ("stored", "in Ozone's table")
        for readers in (1, 5)
    ]
    for each in results:
        assert each["deliveries"] == each["expected"] == 200 * each["connections"]
