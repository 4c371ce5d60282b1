"""What users install: the wheel, made from the sdist, in an environment with nothing else in it.

The other tests use the package that `make test` has installed; the first ones here say that it is
the one of this checkout.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import pytest

import sse_labels
from sse_labels.config import Settings, option_name

from support.database import reachable_directory
from support.reading import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
PACKAGE = Path(sse_labels.__file__).parent
#: `make` keeps the wheels of all dependencies here; without it they come from pip's index.
WHEELS = Path(sys.prefix) / "wheels"

LABELS: list[dict[str, Any]] = [
    {
        "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
        "uri": "at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k1",
        "val": "spam",
        "cts": "2026-01-01T00:00:00.000Z",
    },
    {
        "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
        "uri": "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb",
        "val": "größer",
        "neg": True,
        "cts": "2026-01-01T00:00:01.000Z",
        "exp": "2027-01-01T00:00:00.000Z",
        "sig": {"$bytes": "AAEC"},
    },
]
EVENTS = [
    {"seq": seq, "labels": [{"ver": 1, **label}]} for seq, label in enumerate(LABELS, start=1)
]


def shipped(directory: Path) -> dict[str, bytes]:
    """Return the content of a folder's files by name, without what Python puts beside them."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def checkout() -> dict[str, bytes]:
    """Return what the package of this checkout must consist of."""
    sql = {f"sql/{name}": content for name, content in shipped(ROOT / "sql").items()}
    return shipped(ROOT / "sse_labels") | sql


def test_package_under_test_is_the_installed_one() -> None:
    assert not PACKAGE.is_relative_to(ROOT / "sse_labels"), "run the tests by `make test`"


def test_package_under_test_is_that_of_this_checkout() -> None:
    installed = shipped(PACKAGE)
    stale = [name for name, content in checkout().items() if installed.get(name) != content]
    assert stale == [], "run the tests by `make test`"
    assert installed.keys() == checkout().keys()


def run(*command: str | Path, cwd: Path) -> None:
    """Run a program that must succeed, in an environment where nothing leads to the checkout."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def clean_environment() -> dict[str, str]:
    """Return this environment without what would reach the program under test."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SSE_LABELS_", "VIRTUAL_ENV"))
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the sdist of this checkout."""
    directory = tmp_path_factory.mktemp("built")
    # --no-isolation: hatchling is among the dev dependencies, so no network is needed here.
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", directory)
    run(*build, ROOT, cwd=directory)
    [built] = directory.glob("*.whl")
    return built


def test_wheel_holds_the_package_its_sql_and_its_licence(wheel: Path) -> None:
    about = f"sse_labels-{sse_labels.__version__}.dist-info"
    package = {f"sse_labels/{name}" for name in checkout()}
    assert {"sse_labels/py.typed", "sse_labels/sql/queries/follow.sql"} <= package
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names == package | {
        f"{about}/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }


@dataclass
class Installed:
    """A virtual environment with the wheel and its dependencies in it."""

    bin: Path

    def __call__(self, name: str) -> Path:
        return self.bin / name


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The wheel in an environment of its own, as `pip install` leaves it."""
    directory = tmp_path_factory.mktemp("installed")
    venv = directory / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=directory)
    kept: list[str | Path] = ["--no-index", "--find-links", WHEELS] if WHEELS.is_dir() else []
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python")
    run(*pip, "install", "-q", "--no-compile", *kept, wheel, cwd=directory)
    yield Installed(venv / "bin")
    shutil.rmtree(venv)


@dataclass
class Serving:
    """`sse-labels serve`, running."""

    process: asyncio.subprocess.Process
    url: str
    data_dir: Path


@asynccontextmanager
async def serving(installed: Installed, directory: Path) -> AsyncIterator[Serving]:
    """Run `serve` on any port; the port is in its log."""
    log = directory / "log"
    data_dir = directory / "data"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(installed("sse-labels"), "serve", "--port", "0", "--data-dir", data_dir),
            cwd=directory,
            env=clean_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (said := re.search(r"serving: address=(\S+)", log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        yield Serving(process, said[1], data_dir)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def output_of(*command: str | Path, cwd: Path) -> str:
    """Return what a program writes, which must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=clean_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode()


async def events_as_curl_reads_them(url: str, count: int) -> list[dict[str, Any]]:
    """Read lines as they arrive, like `curl -N`, until `count` of them were events."""
    events: list[dict[str, Any]] = []
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        httpx.AsyncClient(headers={"Accept": "*/*"}) as client,
        client.stream("GET", url) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith('data: {"seq":'):
                events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == count:
                break
    return events


async def test_wheel_serves_publishes_and_tails(installed: Installed, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(label) + "\n" for label in LABELS), encoding="utf-8")
    program = installed("sse-labels")
    with reachable_directory() as directory:
        async with serving(installed, directory) as server:
            await output_of(
                *(program, "publish", labels, "--url", server.url),
                *("--data-dir", server.data_dir),
                cwd=tmp_path,
            )
            tailed = await output_of(
                *(program, "tail", f"{server.url}/stream", "--cursor", "0", "--until-head"),
                cwd=tmp_path,
            )
            assert [json.loads(line) for line in tailed.splitlines()] == EVENTS
            url = f"{server.url}/stream?cursor=0"
            assert await events_as_curl_reads_them(url, len(EVENTS)) == EVENTS
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert await server.process.wait() == 0
        # Its PostgreSQL went with it.
        assert not (server.data_dir / "postgres" / "postmaster.pid").exists()


async def test_installed_program_finds_its_own_files_alone(
    installed: Installed, tmp_path: Path
) -> None:
    where = await output_of(
        installed("python"), "-c",
        "import sse_labels.database.queries as it; print(it.__file__); print(it.folder())",
        cwd=tmp_path,
    )  # fmt: skip
    venv = installed.bin.parent
    file, sql = (Path(line) for line in where.splitlines())
    package = file.parents[1]
    assert package.is_relative_to(venv)
    assert sql == package / "sql"
    assert shipped(package) == checkout()


def test_readme_lists_every_setting_in_order_with_its_default_and_what_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[\w-]+)`[^|]* \| ([^|]+?) \| (.+) \|$", readme, re.MULTILINE)
    assert [(name, text.replace("`", "")) for name, _, text in rows] == [
        (option_name(spec.name), spec.metadata["help"]) for spec in fields(Settings)
    ]
    for (name, shown, _), spec in zip(rows, fields(Settings), strict=True):
        # A default is written as a user may give it: read by the setting's own parser.
        given = None if shown == "–" else spec.metadata["parse"](shown.strip("`"))
        assert given == spec.default, name
