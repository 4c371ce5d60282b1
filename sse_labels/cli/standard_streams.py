"""Standard input, output and error of this process, which may be full, closed or broken.

Promises: what cannot be written to standard output is an `OutputLost`, at once and only once; what
cannot be written to standard error is dropped, so that nothing fails because of its messages; no
file or connection of ours gets the number of a stream that was closed.
Does not belong here: what a command does about lost output.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

import click

from sse_labels.errors import SseLabelsError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2
#: What a closed stream is replaced by. Opened the wrong way round: using it fails, as before.
CLOSED = {STDIN: os.O_WRONLY, STDOUT: os.O_RDONLY, STDERR: os.O_WRONLY}


class OutputLost(SseLabelsError):
    """Standard output cannot be written any more; `broken`: its reader has gone (`| head`)."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        self.broken = error.errno == errno.EPIPE


def tell_result(text: str) -> None:
    """Write what a command has done, which cannot be undone; an OutputLost says it too."""
    try:
        click.echo(text)
    except OutputLost as error:
        error.args = (f"{error}; done all the same: {text}",)
        error.broken = False
        raise


class _Output(io.FileIO):
    """Fails with OutputLost, once: what is still buffered is then dropped."""

    _lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        if self._lost:
            return size
        try:
            written = super().write(data)
        except OSError as error:
            self._lost = True
            raise OutputLost(error) from error
        # None: it does not block, and is full for now. BufferedWriter makes an error of it.
        return written


class _Messages(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError:
            return size
        return size if written is None else written


def guard() -> None:
    """Replace this process's standard streams; call it before anything else is opened."""
    for number, flags in CLOSED.items():
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.open(os.devnull, flags)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(STDIN, closefd=False)  # noqa: SIM115 - for as long as we live
    sys.stdout = _text(_Output(STDOUT, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Messages(STDERR, "w", closefd=False), sys.stderr, "backslashreplace")


def _text(raw: io.FileIO, before: TextIO | None, errors: str = "") -> io.TextIOWrapper:
    """Return a text stream as `before`, which Python made; None: it was closed."""
    lines = bool(errors) or raw.isatty()
    encoding = "utf-8" if before is None else before.encoding
    errors = errors or ("strict" if before is None else before.errors or "strict")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=lines)
