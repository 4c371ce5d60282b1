"""The folder of the tests' files: in memory, when the machine has enough.

A database cloned for a test is 300 new files. On a disk that takes up to 0.2 s, in memory 0.015 s.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MEMORY = Path("/dev/shm")
#: A cluster may keep 1 GiB of write-ahead log (max_wal_size), and several run at the same time.
LEAST_BYTES = 4 << 30


def folder_in_memory() -> Path | None:
    """A folder in memory, if it is large enough and programs may run there; else None.

    None also when the user has set TMPDIR, and in a soak, whose files need too much memory.
    """
    if "TMPDIR" in os.environ or "SSE_LABELS_SOAK_SECONDS" in os.environ:
        return None
    try:
        found = os.statvfs(MEMORY)
        [free] = re.findall(r"(?m)^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text())
    except (OSError, ValueError):
        return None
    # Beside the data there may be a copy of PostgreSQL's programs, for its system user.
    runs = not found.f_flag & os.ST_NOEXEC
    room = min(found.f_bavail * found.f_frsize, 1024 * int(free))
    return MEMORY if runs and room >= LEAST_BYTES and os.access(MEMORY, os.W_OK) else None
