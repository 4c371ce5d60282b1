"""Standard input, output and error of this process, which may be full, closed or broken.

Promises: a failed write to standard output raises `OutputLost`, at once and only once. Text that
cannot be written to standard error is dropped, so that no command fails because of its messages. No
other file or connection gets the number of a standard stream that was closed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

import click

from sse_labels.errors import SseLabelsError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2
#: The mode in which /dev/null replaces a closed stream. It is the wrong one: use still fails.
CLOSED = {STDIN: os.O_WRONLY, STDOUT: os.O_RDONLY, STDERR: os.O_WRONLY}


class OutputLost(SseLabelsError):
    """Standard output cannot be written any more. `broken`: its reader has gone (`| head`)."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        self.broken = error.errno == errno.EPIPE


def write_result(text: str) -> None:
    """Write the result of a command that cannot be undone; OutputLost repeats the result."""
    try:
        click.echo(text)
    except OutputLost as error:
        error.args = (f"{error}; done all the same: {text}",)
        error.broken = False
        raise


class _Output(io.BufferedWriter):
    """Raises OutputLost once, and drops the bytes that are still buffered.

    It subclasses the buffer and not the file below it. With a class of Python below, a signal
    between the write and the buffer's update would write the same bytes twice
    (test_ctrl_c_ends_a_wait_at_once).
    """

    _lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        if not self._lost:
            with self._losing():
                super().write(data)
        return size

    def flush(self) -> None:
        if not self._lost:
            with self._losing():
                super().flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._lost = True
            raise OutputLost(error) from error


class _Messages(io.BufferedWriter):
    """Drops bytes that cannot be written."""

    def write(self, data: ReadableBuffer, /) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def guard() -> None:
    """Replace this process's standard streams; call it before anything else is opened."""
    for number, flags in CLOSED.items():
        try:
            os.fstat(number)
        except OSError:
            # open(2) takes the lowest free number, which is this one.
            os.open(os.devnull, flags)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(STDIN, closefd=False)  # noqa: SIM115 - open until the process ends
    output, messages = (io.FileIO(number, "w", closefd=False) for number in (STDOUT, STDERR))
    sys.stdout = _text(_Output(output), sys.stdout)
    sys.stderr = _text(_Messages(messages), sys.stderr, "backslashreplace")


def _text(buffer: io.BufferedWriter, before: TextIO | None, errors: str = "") -> io.TextIOWrapper:
    """Return a text stream like `before`, which Python made; None: the stream was closed."""
    lines = bool(errors) or buffer.isatty()
    encoding = "utf-8" if before is None else before.encoding
    errors = errors or ("strict" if before is None else before.errors or "strict")
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=lines)
