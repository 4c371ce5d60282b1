"""Every program that a test asks for is one that `make system` installs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support import system
from support.system import PACKAGES

TESTS = Path(__file__).parents[2]


def test_every_program_that_a_test_asks_for_has_a_package() -> None:
    asked = {
        name
        for file in TESTS.rglob("*.py")
        for name in re.findall(r'program\("([^"]+)"\)', file.read_text())
    }
    assert {"nginx", "libatomic.so.1"} <= asked
    assert asked - set(PACKAGES) == set()


def test_what_is_missing_is_named_and_what_is_there_is_not(tmp_path: Path) -> None:
    # A machine without these tests' programs: no folder that a PATH names is there.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PROGRAMS, system.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    named = done.stdout.split()
    programs = {package for name, package in PACKAGES.items() if ".so." not in name}
    # Libraries are looked for elsewhere.
    assert (done.stderr, sorted({*named} - {"libatomic1"})) == ("", sorted(programs))


WITHOUT_PROGRAMS = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, path: which(name, path=sys.argv[2])
runpy.run_path(sys.argv[1], run_name="__main__")
"""
