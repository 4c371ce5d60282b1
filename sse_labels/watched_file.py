"""A small file that is read again when it was changed.

Promises: what a file said when it was last good stays in use when it goes bad, and a change
works at the next question; nothing of a file's content is ever logged.
Stands beside the corridor: lists of tokens and of keys are such files.
Does not belong here: what a file means.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from sse_labels.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Far more than any list of tokens or keys; a wrong path is not read into memory.
FILE_MAX_BYTES = 1024**2
#: A file as young as this may change again without its times telling: ext4 counts in ticks of
#: 4 ms, FAT in steps of 2 s. Git calls such a file racy, and looks again as well.
YOUNG_SECONDS = 2.0


class Unusable(Exception):
    """Raised when a text cannot be used: its message says what was expected, and quotes nothing."""


def each_line(content: bytes, take: Callable[[list[str]], None]) -> None:
    """Call `take` with the words of each line that has any; `#` begins a comment.

    Raises Unusable with the number of the first line that `take` cannot use, never with the line
    itself: who pastes a token in place of its digest is not to find it in the log.
    """
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            words = raw.decode("utf-8").partition("#")[0].split()
            if words:
                take(words)
        except UnicodeDecodeError:
            raise Unusable(f"in line {number}: UTF-8") from None
        except Unusable as error:
            raise Unusable(f"in line {number}: {error}") from None


class WatchedFile(Generic[T]):
    """What a small file says, read again when the file was changed.

    A file that goes bad (or away) later on is logged once, and what it said before stays in use:
    a slip of the editor must not lock everybody out. It costs one `stat` to ask, so that a
    change works at the next request.
    """

    def __init__(self, setting: str, path: Path, parse: Callable[[bytes], T]) -> None:
        """Read `path` with `parse`, which raises Unusable; raise ConfigError under `setting`."""
        self._setting = setting
        self._path = path
        self._parse = parse
        self._stamp: tuple[int, ...] | None = None
        self._complaint = ""
        self._value: T
        self._refresh()

    def value(self) -> T:
        """Return what the file says now, or said when it was last good."""
        try:
            self._refresh()
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error(
                    "a file went bad, what it said before stays in use", extra={"error": error}
                )
        return self._value

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            # Taken before reading: a write in between changes the stamp, and is read next time.
            stamp = stamp_of(status)
            if stamp == self._stamp:
                return
            # A pipe could be read only once, and could make the whole server wait.
            if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_MAX_BYTES:
                raise Unusable(f"a file of at most {FILE_MAX_BYTES} bytes")
            content = self._path.read_bytes()
            young = abs(time.time() - status.st_mtime) < YOUNG_SECONDS
            self._stamp = None if young else stamp
            self._value = self._parse(content)
        except OSError as error:
            self._stamp = None
            raise ConfigError(
                self._setting, str(self._path), f"a file to read ({error.strerror})"
            ) from error
        except Unusable as error:
            raise ConfigError(self._setting, str(self._path), str(error)) from None
        self._complaint = ""


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip
