"""The rule of imports (`[tool.importlinter]`), held against the package under test."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import sse_labels

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
PACKAGE = Path(sse_labels.__file__).parent


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in `directory`, which it searches before the installed packages."""
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    return subprocess.run(
        [program, "--config", PROJECT, "--no-cache"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_one_way_only(tmp_path: Path) -> None:
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_against_the_direction_is_found(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    with (tmp_path / PACKAGE.name / "feed" / "sequencer.py").open("a", encoding="utf-8") as file:
        file.write("\nimport sse_labels.feed.outbox\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "sse_labels.feed.sequencer is not allowed to import sse_labels.feed.outbox" in done.stdout
    )


def test_a_module_without_a_place_in_the_list_is_found(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    (tmp_path / PACKAGE.name / "utils.py").touch()
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "utils" in done.stdout


def test_a_server_starts_without_an_http_client() -> None:
    look = "import sys, sse_labels.cli.serve; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
