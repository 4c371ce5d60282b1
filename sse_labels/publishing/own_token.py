"""The publish token of a server that runs on the embedded database.

Promises: the token is made once, from 256 random bits, and stays the same after every restart. Only
its owner can read it. It is never half-written and never logged. A server refuses a file that
another user made or can read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from sse_labels.errors import ConfigError

FILE_NAME = "publish-token"


def keep_token(data_dir: Path) -> tuple[str, Path]:
    """Return the token in `data_dir` and the path of its file. Make the token if there is none."""
    path = data_dir / FILE_NAME
    try:
        if not path.exists():
            _make(path)
    except OSError as error:
        raise ConfigError(
            "--data-dir", str(data_dir), f"a directory to write to ({error.strerror})"
        ) from error
    return read_token(path, private=True), path


def read_token(path: Path, *, private: bool = False) -> str:
    """Return the token in `path`. Raises ConfigError when there is none.

    With `private`, also raises ConfigError when another user owns the file or can read it.
    """

    def refused(expected: str) -> ConfigError:
        return ConfigError("the token file", str(path), expected)

    try:
        with path.open(encoding="ascii") as file:
            token = file.read().strip()
            found = os.fstat(file.fileno())
    except OSError as error:
        raise refused(f"a readable file ({error.strerror})") from error
    except ValueError as error:
        raise refused("a token of ASCII characters") from error
    owner, mode = found.st_uid, stat.S_IMODE(found.st_mode)
    if private and (owner not in (0, os.geteuid()) or mode & 0o077):
        raise refused(
            f"a file of your own that nobody else can read; it belongs to the user ID {owner} and "
            f"has the mode {mode:04o} (delete it to get a new one, or chown and chmod 600 it)"
        )
    if not token:
        raise refused("a file with a token; delete it to get a new one")
    return token


def _make(path: Path) -> None:
    # The mode is 0600 from the first moment. No earlier killed run can have left the same name.
    descriptor, draft = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            # Before the link: a crash of the machine must not leave an empty token.
            os.fsync(file.fileno())
        # A link fails when the name exists: if two servers start at once, the first token stays.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
