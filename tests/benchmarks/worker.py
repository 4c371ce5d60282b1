"""How the processes of the load are driven: a line of JSON tells, a line of JSON answers.

`Worker` is the side that tells; `obey` is the loop of the one that does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cores

TESTS = Path(__file__).parents[1]


class WorkerError(Exception):
    """A process of the load ended, or could not do what it was told."""


class Worker:
    """A process of the load, `python -m benchmarks.<module>`, pinned to a core."""

    def __init__(self, module: str, core: int) -> None:
        with cores.on(core):
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=TESTS,
                text=True,
            )

    def tell(self, do: str, **what: Any) -> None:
        """Say what to do; it begins at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to what was told longest ago."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"the load ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Say what to do and wait until it is done."""
        self.tell(do, **what)
        return self.answer()

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def obey(actions: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Do what standard input says, one line after the other, until it ends."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = actions[order.pop("do")](**order)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
