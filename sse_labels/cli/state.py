"""The cursor in a file, for one tail at a time.

Promises: the file holds one whole number at every moment, also when the program
is killed in the middle; it never claims more than what was written out.
Does not belong here: when the cursor moves (`tail`).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.protocol.seq import DIGITS_MAX, number_in

KEY = "--state"


class CursorFile:
    """Keeps the cursor; open and locked as long as it lives."""

    def __init__(self, file: Path) -> None:
        """Open and lock `file`; raise ConfigError when it cannot be."""
        self._file = file
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(KEY, str(file), "a file that no other tail uses") from None
        except OSError as error:
            raise ConfigError(KEY, str(file), f"a file to write to ({error.strerror})") from None

    def load(self) -> int | None:
        """Return the cursor, None when the file is new; raise ConfigError when it holds no seq."""
        content = os.pread(self._descriptor, 64, 0)
        if not content:
            return None
        cursor = number_in(content.strip())
        if cursor is None:
            raise ConfigError(KEY, str(self._file), "a file with one cursor in it, or a new one")
        return cursor

    def save(self, cursor: int) -> None:
        """Remember `cursor`; called after the event was written out."""
        # The file keeps one length and is written in place by one system call. That outlives a
        # kill; a crash of the machine may bring an older cursor back.
        try:
            os.pwrite(self._descriptor, b"%0*d\n" % (DIGITS_MAX, cursor), 0)
        except OSError as error:
            raise SseLabelsError(
                f"{KEY}: {self._file}: {error.strerror}; seq {cursor} was written out and not noted"
            ) from error
