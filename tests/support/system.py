"""Programs that come from Debian's packages; `make test` installs them where it may."""

from __future__ import annotations

import os
import shutil

#: Program and the package that has it.
PACKAGES = {
    "chromium": "chromium",
    "nginx": "nginx",
    "pgbouncer": "pgbouncer",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
}


def program(name: str) -> str:
    """Its path; without it the test is skipped, naming the command that installs it."""
    # An ordinary user's PATH has no sbin.
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        # Not on top: benchmarks run without it, and look for themselves.
        import pytest

        pytest.skip(f"{name} is not installed; on Debian: sudo apt-get install {PACKAGES[name]}")
    return path
