"""Files that we alone may open: locks, and the log.

Promises: a killed holder's lock is free at once, by the kernel: there is no count to go wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def open_private(path: Path) -> int:
    """Open a file to read and append to, made when missing."""
    # Not through a link: that account may own the directory, and root must not write elsewhere.
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Wait for the lock, and hold it during the block."""
    lock = open_private(path)
    try:
        fcntl.flock(lock, how)
        yield lock
    finally:
        # Closing alone is not enough while a child between fork and exec still has it open.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
