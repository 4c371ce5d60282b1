"""The benchmarks work: they start, deliver everything, and say so. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.program import REPOSITORY


def test_small_benchmark_delivers_everything_and_writes_json(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "benchmarks", "--size", "small", "--only", "D"),
        *("--peers", "-", "--history", "2000", "--out", str(tmp_path)),
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY / "tests", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["size"] == "small"
    assert found["command"] in (tmp_path / "results.md").read_text()
    results = found["results"]
    assert [(each["scenario"], each["variant"]) for each in results] == [
        ("D", f"2000 stored, {readers} at once") for readers in (1, 5)
    ]
    for each in results:
        assert each["server"] == "service"
        assert each["verdict"] in ("complete", "falls behind"), each["problems"]
        assert each["deliveries"] == each["expected"] == 2000 * each["connections"]
        assert each["server_us"] is not None
        assert each["rate"] > 0
