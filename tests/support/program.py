"""The program as a user starts it: a child process whose output is read line by line.

`with running("serve", "--port", "0") as server:` ends it after the block. Every wait has a
deadline. No wait sleeps: it wakes at the next line of output or at the end of the process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[2]
#: A test that waits longer than this fails.
PATIENCE_SECONDS = 30.0
#: The command when there is no console script.
_CALL = [sys.executable, "-c", "from sse_labels.cli import main; main()"]

#: Short times, so that tests wait less.
QUICK_SERVER = (
    "--port=0",
    "--poll-seconds=0.2",
    "--retry-min-seconds=0.01",
    "--retry-max-seconds=0.02",
)


def installed() -> Path | None:
    """The console script beside this interpreter."""
    script = Path(sys.executable).with_name("sse-labels")
    return script if script.exists() else None


def command() -> list[str]:
    """The console script, else the same call on the checkout's code."""
    script = installed()
    return _CALL if script is None else [str(script)]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of `sse-labels`, and `variables`."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("SSE_LABELS_")}
    if installed() is None:
        # Only then: it would hide an installed package.
        kept["PYTHONPATH"] = str(REPOSITORY)
    return {**kept, "COLUMNS": "80", "TERM": "dumb", **variables}


class Program:
    """One run of `sse-labels`."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.PIPE,
        stderr: int | IO[Any] = subprocess.PIPE,
    ) -> None:
        self.process = subprocess.Popen(
            [*command(), *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment(**(env or {})),
            cwd="/",
            # Its own group, because Ctrl-C at a terminal reaches every process of a group.
            start_new_session=True,
        )
        #: Its output so far, as lines without line ends.
        self.out: list[str] = []
        self.err: list[str] = []
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines), daemon=True)
            for pipe, lines in (
                (self.process.stdout, self.out),
                (self.process.stderr, self.err),
            )
            if pipe is not None
        ]
        for reader in self._readers:
            reader.start()

    @property
    def output(self) -> str:
        """Standard output."""
        return "".join(f"{line}\n" for line in self.out)

    @property
    def errors(self) -> str:
        """Standard error."""
        return "".join(f"{line}\n" for line in self.err)

    @property
    def status(self) -> int | None:
        """The exit status, once it has ended."""
        return self.process.returncode

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line of either output that matches `pattern`; fail when the program ends."""

        def found() -> re.Match[str] | None:
            return next(
                (match for line in [*self.err, *self.out] if (match := re.search(pattern, line))),
                None,
            )

        self.wait_until(lambda: found() is not None, pattern)
        match = found()
        assert match is not None
        return match

    def wait_until(self, enough: Callable[[], bool], what: str = "what was expected") -> None:
        """Wait until `enough()` is true; it is called again at every line."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while not enough():
                ended = not any(reader.is_alive() for reader in self._readers)
                if ended or not self._changed.wait(deadline - time.monotonic()):
                    if enough():
                        return
                    raise AssertionError(
                        f"no line with {what!r} came; {'it ended' if ended else 'it still runs'}\n"
                        f"--- standard output\n{self.output[-2000:]}\n"
                        f"--- standard error\n{self.errors[-4000:]}"
                    )

    def url(self) -> str:
        """Wait until the server, with all its workers, serves; return its address."""
        return self.wait_for(r"INFO sse_labels\.\S+: serving: address=(http://\S+)")[1]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process only."""
        self.process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to the whole group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Wait for the end and read all output; return the exit status."""
        status = self.process.wait(PATIENCE_SECONDS)
        for reader in self._readers:
            # The reader ends with the last process that has the pipe. No child may stay behind.
            reader.join(PATIENCE_SECONDS)
            assert not reader.is_alive(), "a process that was left running holds the output open"
        return status

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.send(number)
        return self.wait()

    def _read(self, pipe: IO[bytes], lines: list[str]) -> None:
        with pipe:
            for raw in pipe:
                with self._changed:
                    lines.append(raw.decode(errors="replace").rstrip("\r\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Iterator[Program]:
    """Start the program; end it after the block, and kill it when it does not end."""
    program = Program(*arguments, **options)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.send(signal.SIGTERM)
        try:
            program.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            program.process.kill()
        program.wait()


def ran(*arguments: str, text: str | bytes | None = None, **options: Any) -> Program:
    """Run the program to its end; `text` is its standard input."""
    stdin = subprocess.DEVNULL if text is None else subprocess.PIPE
    with running(*arguments, stdin=stdin, **options) as program:
        if program.process.stdin is not None:
            # The program may end before it has read all of it.
            with contextlib.suppress(BrokenPipeError), program.process.stdin as pipe:
                pipe.write(text.encode() if isinstance(text, str) else text or b"")
        program.wait()
    return program


def ran_all(calls: Iterable[tuple[tuple[str, ...], dict[str, str]]]) -> list[Program]:
    """Run several programs, given as (arguments, environment), a few at a time."""
    ended: list[Program] = []
    waiting = list(calls)
    while waiting:
        with contextlib.ExitStack() as stack:
            few = [
                stack.enter_context(running(*arguments, env=env)) for arguments, env in waiting[:4]
            ]
            for program in few:
                program.wait()
            ended += few
        del waiting[:4]
    return ended


@dataclass
class Called:
    """The result of one call of the command line."""

    status: int
    out: list[str]
    err: list[str]


#: Runs the calls that standard input lists, each as in a new process.
_CALLS = """
import json, os, sys, tempfile
from sse_labels.cli import main

answers, before = os.dup(1), dict(os.environ)
for arguments, env in json.load(sys.stdin):
    os.environ.update(env)
    sys.argv = ["sse-labels", *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            main()
        except SystemExit as end:
            status = end.code
        sys.stderr.flush()
        lines = [os.pread(each, 1 << 20, 0).decode().splitlines() for each in (1, 2)]
    os.write(answers, json.dumps([status, *lines]).encode() + b"\\n")
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
"""


def called_all(calls: Iterable[tuple[tuple[str, ...], dict[str, str]]], **env: str) -> list[Called]:
    """Call the command line several times in one process; calls that are refused end at once."""
    done = subprocess.run(
        [sys.executable, "-c", _CALLS], input=json.dumps(list(calls)), env=environment(**env),
        cwd="/", capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Called(*json.loads(line)) for line in done.stdout.splitlines()]


def failure(program: Program | Called) -> tuple[int, str]:
    """The status and the message of a refused run; it must have no other output."""
    assert not any("Traceback" in line for line in program.err), program.err
    assert program.out == []
    assert program.err[-1:], "it said nothing"
    assert program.status is not None
    return program.status, program.err[-1]


def _ports() -> Iterator[int]:
    """Ports for this process only, each once; after that ports that the kernel chooses."""
    # Below the ports that the kernel chooses. The kernel could give a port of its range to another
    # process before the server listens, or while the server is started again. Each process of
    # pytest-xdist has its own ports.
    kernels = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    # Above 10080, the highest port that Chromium refuses to open (net/base/port_util.cc).
    ours = [port for port in range(10_081, kernels) if port % 16 == worker % 16]
    random.SystemRandom().shuffle(ours)
    yield from ours
    yield from itertools.repeat(0)


_free_ports = _ports()


def free_port() -> int:
    """A port that was free a moment ago; use --port 0 when the number does not matter."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", next(_free_ports)))
            port: int = probe.getsockname()[1]
            return port


def postgres_runs_in(data_dir: Path) -> bool:
    """Whether an embedded PostgreSQL runs in a data directory."""
    try:
        pid = int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])
        return Path(f"/proc/{pid}/cwd").samefile(data_dir / "postgres")
    except (OSError, ValueError, IndexError):
        return False
