"""Programs and libraries of Debian that the tests need; `make system` installs them.

    python3 tests/support/system.py

prints the missing packages. It runs before other packages are installed, so at the top it imports
only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import shutil

#: Programs and libraries, the package of each, and its use.
PACKAGES = {
    "chromium": "chromium",  # the dashboard and labels.js in a real browser
    "curl": "curl",  # the lines of the README, and HTTP/2 through nginx
    # The Node.js in Playwright's driver needs it. Debian's own programs do not need it, so a new
    # machine does not have it.
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
    """The path of a program or the name of a library; skip the test without it.

    The reason of the skip names the command that installs it.
    """
    path = _found(name)
    if path is None:
        # Not at the top: benchmarks run without pytest.
        import pytest

        pytest.skip(f"{name} is not installed; on Debian: sudo apt-get install {PACKAGES[name]}")
    return path


if __name__ == "__main__":
    print(*sorted({package for name, package in PACKAGES.items() if _found(name) is None}))  # noqa: T201
