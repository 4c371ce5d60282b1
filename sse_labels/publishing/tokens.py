"""Who may publish: several tokens at a time, kept as digests, changed without a restart.

Promises: a token is compared with every one that is known, in constant time and
without an early exit; what stands in the file, in memory and in the log cannot be
used as a token; a file that went bad changes nothing.
Stands beside the corridor, at the door for publishers.
Does not belong here: HTTP, what a right opens (`web`), the embedded server's one
token (`publish_token`).

The digest is a plain SHA-256. A slow hash (argon2, scrypt) makes guessing dear where
people choose the secret; these are 256 random bits, of which nobody guesses any, and a
slow hash would let whoever sends wrong tokens buy our CPU with theirs.
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
#: What a token may be given; several are joined by a comma.
RIGHTS = (PUBLISH, ADMIN)
#: Written for no right at all: a token that is known, and refused with 403.
NO_RIGHTS = "none"
#: The name of the one token that is a setting.
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
    """Who a token was made for, and what it may do."""

    name: str
    rights: frozenset[str]
    digest: bytes = field(repr=False)


class PublishTokens:
    """All publish tokens: the one that is a setting, and those of the file as it is now."""

    def __init__(self, token: str | None = None, file: Path | None = None) -> None:
        """Read `file`; raise ConfigError naming the line when it cannot be used.

        A line is `name sha256:<64 hex digits>` and, after it, the rights: `publish` (the
        default), `admin`, both joined by a comma, or `none`. `#` begins a comment.
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
        """Return whether nobody can publish, because no token is known."""
        return not self._known()

    def who(self, token: str) -> Holder | None:
        """Return whom `token` belongs to, None when nobody here knows it."""
        given = digest_of(token)
        found = None
        for known in self._known():
            # No break: how long it takes must not tell which token was nearly, or really, hit.
            # (test_a_token_is_compared_with_every_one_that_is_known)
            if hmac.compare_digest(given, known.digest):
                found = known
        return found

    def _known(self) -> tuple[Holder, ...]:
        return self._setting if self._file is None else self._setting + self._file.value()


def digest_of(token: str) -> bytes:
    """Return a token's SHA-256, 32 bytes whatever was sent."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def new_token() -> str:
    """Return a token of 256 random bits, 43 characters that fit a header, a URL and a shell."""
    return secrets.token_urlsafe(32)


def line_for(name: str, token: str, rights: Iterable[str] = (PUBLISH,)) -> str:
    """Return the line for `token`, without a line end; raise ConfigError for a wrong name."""
    if not _NAME.fullmatch(name) or name == SETTING_NAME:
        raise ConfigError("NAME", name, _EXPECTED_NAME)
    written = ",".join(right for right in RIGHTS if right in set(rights)) or NO_RIGHTS
    return f"{name} sha256:{digest_of(token).hex()} {written}"


def parse_rights(text: str) -> frozenset[str]:
    """Return the rights written as `publish,admin` or `none`; raise Unusable for others."""
    if text == NO_RIGHTS:
        return frozenset()
    rights = text.split(",")
    if not set(rights) <= set(RIGHTS) or len(set(rights)) < len(rights):
        raise Unusable(_EXPECTED_RIGHTS)
    return frozenset(rights)


def parse_tokens(content: bytes, others: tuple[Holder, ...] = ()) -> tuple[Holder, ...]:
    """Return the tokens of a file; raise Unusable with the number of the first bad line.

    Names and tokens stand once, also among `others`: of two lines for one token, which has
    other rights, neither can be believed.
    """
    found: dict[str, Holder] = {}
    digests = {known.digest for known in others}

    def take(words: list[str]) -> None:
        holder = _parse_line(words)
        if holder.name in found:
            raise Unusable("a name that no other line has")
        if holder.digest in digests:
            raise Unusable("a token that stands nowhere else, in the file or as the setting")
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
    """Make a token, append its line to `file`, return the token: it stands nowhere else.

    The file is made when there is none, for its owner alone. Raises ConfigError, and leaves the
    file as it was, when the name exists there or the file is not one of tokens.
    """
    token = new_token()
    line = line_for(name, token, rights)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as opened:
            # Two that add the same name at once: the second finds the first one's line.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = opened.read()
            if any(known.name == name for known in parse_tokens(content)):
                raise ConfigError("NAME", name, f"a name that does not stand in {file} yet")
            start = "\n" if content and not content.endswith(b"\n") else ""
            added = f"{start}{line}\n".encode("ascii")
            try:
                # In one call, so that a server never reads half a line.
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
