"""What processes used: CPU and memory out of /proc, and percentiles."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third on (proc(5)); the second may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents.setdefault(int(_stat(int(folder.name))[1]), []).append(int(folder.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, its descendants, and those of them that have ended; in 10 ms."""
    ticks = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            # utime, stime, and those of children that were waited for.
            ticks += sum(map(int, _stat(each)[11:15]))
    return ticks * _TICK


def memory_kib(pids: Iterable[int], key: str = "VmRSS") -> int:
    """Resident memory of processes; `VmHWM`: the most since `forget_peak`."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(f"{key}:"):
                    total += int(line.split()[1])
    return total


def forget_peak(pids: Iterable[int]) -> None:
    """Let VmHWM begin anew."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def digest(seqs: Iterable[int]) -> str:
    """What tells apart two lists of seqs."""
    return hashlib.sha256(" ".join(map(str, seqs)).encode()).hexdigest()


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of sorted values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
