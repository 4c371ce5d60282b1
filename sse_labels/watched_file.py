"""A small file that is read again when it changes, such as a list of tokens or keys.

Promises: a change has an effect at the next call of `value`. When the file becomes unusable, its
last usable content stays in use. No content of a file is ever logged.
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

#: Far more than any list of tokens or keys needs. A larger file is not read into memory.
FILE_MAX_BYTES = 1024**2
#: A file younger than this may change again without a new timestamp: timestamps have steps of 4 ms
#: on ext4, of 2 s on FAT. Git calls such a file racy, and also reads the file again.
YOUNG_SECONDS = 2.0


class Unusable(Exception):
    """A text is unusable. The message says what was expected, and never quotes the text."""


def each_line(content: bytes, take: Callable[[list[str]], None]) -> None:
    """Call `take` with the words of each line that has words. `#` begins a comment.

    Raises Unusable with the number of the first line that `take` cannot use. The message never
    contains the line: a token that was pasted in place of its digest must not be logged.
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
    """The value of a small file, read again when the file changes.

    When the file becomes unusable or is deleted, this is logged once, and the last value stays in
    use: an error in an editor must not lock everybody out. Each call costs one `stat`, so that a
    change has an effect at the next request.
    """

    def __init__(self, setting: str, path: Path, parse: Callable[[bytes], T]) -> None:
        """Read `path` with `parse`, which may raise Unusable. Raises ConfigError for `setting`."""
        self._setting = setting
        self._path = path
        self._parse = parse
        self._stamp: tuple[int, ...] | None = None
        self._complaint = ""
        self._value: T
        self._refresh()

    def value(self) -> T:
        """Return the current value, or the last usable one."""
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
            # The stamp is taken before the read: a later write changes it, and is read next time.
            stamp = stamp_of(status)
            if stamp == self._stamp:
                return
            # A pipe can be read only once, and could block the whole server.
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
    """Return numbers that change when a file is written or replaced."""
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip
