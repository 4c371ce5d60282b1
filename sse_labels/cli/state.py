"""The file that keeps the cursor of one `tail`.

Promises: the file holds one whole number at every moment, also when the program is killed while it
writes. The number is never above the seq of the last label that was written out.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.protocol.seq import DIGITS_MAX, number_in

KEY = "--state"


class CursorFile:
    """Keeps the cursor; the file stays open and locked until the process ends."""

    def __init__(self, file: Path) -> None:
        """Open and lock `file`; raise ConfigError when that fails."""
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
        """Store `cursor`; called after the event was written out."""
        # The file keeps its length, and one system call writes all of it. A kill cannot damage it.
        # After a crash of the machine it may hold an older cursor.
        try:
            os.pwrite(self._descriptor, b"%0*d\n" % (DIGITS_MAX, cursor), 0)
        except OSError as error:
            raise SseLabelsError(
                f"{KEY}: {self._file}: {error.strerror}; seq {cursor} was written out and not noted"
            ) from error
