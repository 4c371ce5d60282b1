"""Client libraries by other authors, and the program around each, in `tests/soak/clients`."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.node import NEWEST, OLDER, SCRIPTS, node_folder, node_program

CLIENTS = Path(__file__).parents[1] / "soak" / "clients"


@dataclass(frozen=True)
class Library:
    """A client library, and the command of the program around it."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def python(name: str, script: str) -> Library:
    return Library(f"{name} (Python)", (sys.executable, str(CLIENTS / "python" / script)))


def javascript(name: str, script: Path, *flags: str, packages: str = NEWEST) -> Library:
    folder = str(node_folder(packages))
    return Library(
        f"{name} (npm)", (node_program(), *flags, str(script)), {"SSE_LABELS_NODE": folder}
    )


def quick_readers() -> list[Library]:
    """Readers of event streams from npm and Python; their packages are always installed."""
    npm = CLIENTS / "javascript"
    return [
        javascript("eventsource", npm / "eventsource.mjs"),
        javascript("event-source-polyfill", npm / "event-source-polyfill.mjs"),
        javascript("@microsoft/fetch-event-source", npm / "fetch-event-source.mjs"),
        javascript("EventSource of Node", npm / "undici.mjs", "--experimental-eventsource"),
        python("httpx-sse", "read_httpx_sse.py"),
        python("sseclient-py", "read_sseclient_py.py"),
        python("requests-sse", "read_requests_sse.py"),
        python("aiohttp-sse-client", "read_aiohttp_sse_client.py"),
    ]


def subscribers() -> list[Library]:
    """Readers of the WebSocket."""
    return [
        javascript("@atproto/xrpc-server", SCRIPTS / "subscribe.mjs"),
        javascript("@atproto/xrpc-server, older", SCRIPTS / "subscribe.mjs", packages=OLDER),
        python("atproto SDK", "read_atproto.py"),
    ]


@functools.cache
def built_libraries(cache: Path) -> tuple[list[Library], list[str]]:
    """The libraries of Go, Rust and Java, built in `cache`; and sentences about missing tools."""
    libraries: list[Library] = []
    missing: list[str] = []
    for language, tools, build in (
        ("Go", ("go",), _go),
        ("Rust", ("cargo",), _rust),
        ("Java", ("java", "javac", "mvn"), _java),
    ):
        absent = [tool for tool in tools if shutil.which(tool) is None]
        if absent:
            missing.append(f"{language}'s clients are left out: {', '.join(absent)} not found")
        else:
            libraries += build(cache / language.lower())
    return libraries, missing


def _go(target: Path) -> list[Library]:
    names = {
        "tmaxmax": "tmaxmax/go-sse",
        "r3labs": "r3labs/sse",
        "launchdarkly": "launchdarkly/eventsource",
    }
    target.mkdir(parents=True, exist_ok=True)
    _build("go", ["go", "build", "-o", f"{target}/", *(f"./{name}" for name in names)])
    return [Library(f"{name} (Go)", (str(target / file),)) for file, name in names.items()]


def _rust(target: Path) -> list[Library]:
    _build("rust", ["cargo", "build", "--release", "--locked", "--target-dir", str(target)])
    names = ("reqwest-eventsource", "eventsource-client")
    return [Library(f"{name} (Rust)", (str(target / "release" / name),)) for name in names]


def _java(target: Path) -> list[Library]:
    jars, classes = target / "jars", target / "classes"
    if not jars.is_dir():
        copy = ["mvn", "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        _build("java", copy)
    sources = [file.name for file in (CLIENTS / "java").glob("*.java")]
    _build("java", ["javac", "-cp", f"{jars}/*", "-d", str(classes), *sources])
    names = {"OkHttpSse": "okhttp-sse", "LaunchDarkly": "okhttp-eventsource"}
    return [
        Library(f"{name} (Java)", ("java", "-cp", f"{classes}:{jars}/*", file))
        for file, name in names.items()
    ]


def _build(language: str, command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=CLIENTS / language, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
