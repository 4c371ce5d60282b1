"""Publish tokens: several at a time, kept as digests, changed without a restart.

Promises: a given token is compared with every known token, in constant time and without an early
exit. The texts in the file, in memory and in the log cannot be used as tokens. A file that becomes
unusable changes nothing.
Does not belong here: HTTP, what a right allows (`web`), the embedded server's token (`own_token`).

The digest is a plain SHA-256. A slow hash (argon2, scrypt) helps where people choose the secret.
These tokens have 256 random bits, which nobody can guess. With a slow hash, anybody could use up
our CPU by sending wrong tokens.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sse_labels.errors import ConfigError
from sse_labels.watched_file import Unusable, WatchedFile, each_line

PUBLISH = "publish"
ADMIN = "admin"
#: The rights that a token may have. Several rights are joined by a comma.
RIGHTS = (PUBLISH, ADMIN)
#: The text for a token without rights: the token is known, and refused with 403.
NO_RIGHTS = "none"
#: The name of the token that is a setting.
SETTING_NAME = "publish-token"
FILE_SETTING = "--publish-tokens-file"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_EXPECTED_NAME = (
    "1 to 64 of the characters A-Z a-z 0-9 . _ @ -, a letter or digit first, "
    f"and not {SETTING_NAME!r}, which is the setting's"
)
_EXPECTED_RIGHTS = f"{' or '.join(RIGHTS)}, both joined by a comma, or {NO_RIGHTS}"
_EXPECTED_LINE = f"name sha256:<64 hex digits> [rights], the rights {_EXPECTED_RIGHTS}"


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a token, and the token's rights."""

    name: str
    rights: frozenset[str]
    digest: bytes = field(repr=False)


class PublishTokens:
    """All publish tokens: the one in the settings, and the current ones of the file."""

    def __init__(self, token: str | None = None, file: Path | None = None) -> None:
        """Read `file`. Raises ConfigError, which names the line, when the file is unusable.

        A line is `name sha256:<64 hex digits>` and then the rights: `publish` (the default),
        `admin`, both joined by a comma, or `none`. `#` begins a comment.
        """
        self._setting: tuple[Holder, ...] = ()
        if token is not None:
            self._setting = (Holder(SETTING_NAME, frozenset({PUBLISH}), digest_of(token)),)
        self._file = None
        if file is not None:
            parse = partial(parse_tokens, others=self._setting)
            self._file = WatchedFile(FILE_SETTING, file, parse)

    @property
    def empty(self) -> bool:
        """Return whether no token is known, so that nobody can publish."""
        return not self._known()

    def find(self, token: str) -> Holder | None:
        """Return the holder of `token`, None when the token is unknown."""
        given = digest_of(token)
        found = None
        for known in self._known():
            # No break: the time must not reveal which known token is the given one, or similar.
            # Guarded by test_a_token_is_compared_with_every_one_that_is_known.
            if hmac.compare_digest(given, known.digest):
                found = known
        return found

    def _known(self) -> tuple[Holder, ...]:
        return self._setting if self._file is None else self._setting + self._file.value()


def digest_of(token: str) -> bytes:
    """Return the SHA-256 of any text, 32 bytes."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def new_token() -> str:
    """Return a token of 256 random bits: 43 characters, safe in a header, a URL and a shell."""
    return secrets.token_urlsafe(32)


def line_for(name: str, token: str, rights: Iterable[str] = (PUBLISH,)) -> str:
    """Return the line for `token`, without a line end. Raises ConfigError for a wrong name."""
    if not _NAME.fullmatch(name) or name == SETTING_NAME:
        raise ConfigError("NAME", name, _EXPECTED_NAME)
    written = ",".join(right for right in RIGHTS if right in set(rights)) or NO_RIGHTS
    return f"{name} sha256:{digest_of(token).hex()} {written}"


def parse_rights(text: str) -> frozenset[str]:
    """Return the rights in a text such as `publish,admin` or `none`. Raises Unusable."""
    if text == NO_RIGHTS:
        return frozenset()
    rights = text.split(",")
    if not set(rights) <= set(RIGHTS) or len(set(rights)) < len(rights):
        raise Unusable(_EXPECTED_RIGHTS)
    return frozenset(rights)


def parse_tokens(content: bytes, others: tuple[Holder, ...] = ()) -> tuple[Holder, ...]:
    """Return the tokens of a file. Raises Unusable with the number of the first bad line.

    Each name and each token may stand only once, also among `others`: two lines for one token could
    give it different rights.
    """
    found: dict[str, Holder] = {}
    digests = {known.digest for known in others}

    def take(words: list[str]) -> None:
        holder = _parse_line(words)
        if holder.name in found:
            raise Unusable("a name that no other line has")
        if holder.digest in digests:
            raise Unusable("a token that stands nowhere else, in the file or in the settings")
        found[holder.name] = holder
        digests.add(holder.digest)

    each_line(content, take)
    return tuple(found.values())


def _parse_line(words: list[str]) -> Holder:
    digest = _DIGEST.fullmatch(words[1]) if len(words) in (2, 3) else None
    if digest is None:
        raise Unusable(_EXPECTED_LINE)
    if not _NAME.fullmatch(words[0]) or words[0] == SETTING_NAME:
        raise Unusable(f"as the name {_EXPECTED_NAME}")
    rights = frozenset({PUBLISH}) if len(words) == 2 else parse_rights(words[2])
    return Holder(words[0], rights, bytes.fromhex(digest[1]))


def add_token(file: Path, name: str, rights: Iterable[str] = (PUBLISH,)) -> str:
    """Make a token, append its line to `file`, and return the token, which is stored nowhere.

    A missing file is made, and only its owner can read it. Raises ConfigError when the name exists
    in the file, or when the file is not a file of tokens. Then the file stays as it was.
    """
    token = new_token()
    line = line_for(name, token, rights)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as opened:
            # If two commands add the same name at once, the second finds the first one's line.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = opened.read()
            if any(known.name == name for known in parse_tokens(content)):
                raise ConfigError("NAME", name, f"a name that does not stand in {file} yet")
            start = "\n" if content and not content.endswith(b"\n") else ""
            added = f"{start}{line}\n".encode("ascii")
            try:
                # One call to `write`, so that a server never reads half a line.
                if os.write(descriptor, added) < len(added):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, len(content))
                raise
    except Unusable as error:
        raise ConfigError(FILE_SETTING, str(file), str(error)) from None
    except OSError as error:
        raise ConfigError(
            FILE_SETTING, str(file), f"a file to write to ({error.strerror})"
        ) from error
    return token
