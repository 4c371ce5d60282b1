"""The publish token of a server that runs on the embedded database.

Promises: made once, from 256 random bits, readable by its owner alone, and the
same after every restart; never half-written, never logged.
Stands beside the corridor, at the door for publishers.
Does not belong here: comparing tokens (`web.publish`).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from sse_labels.errors import ConfigError

FILE_NAME = "publish-token"


def keep_token(data_dir: Path) -> tuple[str, Path]:
    """Return the token kept in `data_dir` and where it stands; make it when there is none."""
    path = data_dir / FILE_NAME
    token = secrets.token_urlsafe(32)
    draft = data_dir / f".{FILE_NAME}.{os.getpid()}"
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
        try:
            # A link fails when the name exists: of two servers that start at once, one wins.
            os.link(draft, path)
        except FileExistsError:
            token = read_token(path)
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(
            "--data-dir", str(data_dir), f"a directory to write to ({error})"
        ) from error
    return token, path


def read_token(path: Path) -> str:
    """Return the token that stands in `path`; raise ConfigError when there is none."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError("the token file", str(path), f"a readable file ({error})") from error
    if not token:
        raise ConfigError("the token file", str(path), "a token in it; delete it to get a new one")
    return token
