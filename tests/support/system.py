"""Programs and libraries of Debian's that the tests need; `make system` installs them.

    python3 tests/support/system.py

prints the packages that are missing. It runs before anything is installed: the standard library
alone is imported on top.
"""

from __future__ import annotations

import ctypes
import os
import shutil

#: What a test looks for, the package that has it, and what for.
PACKAGES = {
    "chromium": "chromium",  # the dashboard and labels.js in a real browser
    "curl": "curl",  # the lines of the README, and HTTP/2 through nginx
    # The Node.js in Playwright's driver is linked to it. Debian's own programs are not, so that a
    # machine on which nothing else was installed does not have it.
    "libatomic.so.1": "libatomic1",
    "nginx": "nginx",  # the site file, before real servers
    "openssl": "openssl",  # certificates for nginx
    "pgbouncer": "pgbouncer",  # servers whose database is behind a pooler
    "prometheus": "prometheus",  # scrapes and evaluates the alerts
    "promtool": "prometheus",  # checks the alerts
    "systemd-analyze": "systemd",  # checks the unit file
}


def _found(name: str) -> str | None:
    if ".so." in name:
        try:
            ctypes.CDLL(name)
        except OSError:
            return None
        return name
    # An ordinary user's PATH has no sbin.
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def program(name: str) -> str:
    """The path of a program, the name of a library; without it the test is skipped.

    The reason names the command that installs it.
    """
    path = _found(name)
    if path is None:
        # Not on top: benchmarks run without it, and look for themselves.
        import pytest

        pytest.skip(f"{name} is not installed; on Debian: sudo apt-get install {PACKAGES[name]}")
    return path


if __name__ == "__main__":
    print(*sorted({package for name, package in PACKAGES.items() if _found(name) is None}))  # noqa: T201
