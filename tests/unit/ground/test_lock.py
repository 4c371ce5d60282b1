"""The locks in tests/python: what `make` installs is what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[3]
ASKED = tomllib.loads((PROJECT / "pyproject.toml").read_text())
RUN = ASKED["build-system"]["requires"] + ASKED["project"]["dependencies"]
DEV = ASKED["project"]["optional-dependencies"]["dev"]


def locked(name: str) -> dict[str, set[str]]:
    """The versions of each package; some have one for each Python."""
    found: dict[str, set[str]] = {}
    lock = (PROJECT / "tests/python" / name).read_text()
    for package, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", lock, re.MULTILINE):
        found.setdefault(canonicalize_name(package), set()).add(version)
    return found


@pytest.mark.parametrize(("lock", "wanted"), [("run.lock", RUN), ("dev.lock", RUN + DEV)])
def test_every_requirement_is_locked_within_its_range(lock: str, wanted: list[str]) -> None:
    versions = locked(lock)
    for requirement in map(Requirement, wanted):
        found = versions.get(canonicalize_name(requirement.name))
        assert found, f"{requirement} is not in {lock}: make lock"
        assert all(map(requirement.specifier.contains, found)), f"{requirement}: {found}: make lock"


def test_both_locks_name_the_same_versions() -> None:
    run, dev = locked("run.lock"), locked("dev.lock")
    assert run == {name: versions for name, versions in dev.items() if name in run}


@pytest.mark.parametrize("name", ["run.lock", "dev.lock"])
def test_each_version_has_hashes_and_no_address(name: str) -> None:
    lock = (PROJECT / "tests/python" / name).read_text()
    assert "://" not in lock
    for package in re.split(r"\n(?=\S)", lock):
        assert "--hash=sha256:" in package, package
