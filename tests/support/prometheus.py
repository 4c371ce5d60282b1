"""Where Debian's Prometheus is; a test without it is skipped and says how to get it."""

from __future__ import annotations

import shutil

import pytest


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: sudo apt-get install prometheus")
    return found
