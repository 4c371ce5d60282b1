"""The publish token of a server that runs on the embedded database.

Promises: made once, from 256 random bits, readable by its owner alone, and the
same after every restart; never half-written, never logged. A server believes no file that another
user made or could read.
Stands beside the corridor, at the door for publishers.
Does not belong here: comparing tokens (`web.publish`).
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
    """Return the token kept in `data_dir` and where it stands; make it when there is none."""
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
    """Return the token that stands in `path`; raise ConfigError when there is none.

    `private`: and when another user owns the file, or can read it.
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
        raise refused("a token in it; delete it to get a new one")
    return token


def _make(path: Path) -> None:
    # 0600 from the first moment, under a name that no killed run can have left behind.
    descriptor, draft = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            # Before it gets its name: a crash of the machine must not leave an empty token.
            os.fsync(file.fileno())
        # A link fails when the name exists: of two servers that start at once, one wins.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
