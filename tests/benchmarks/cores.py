"""Which process runs where: servers on one core, all the rest on another."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

#: What 10,000 connections need, and what is open beside them.
FILES = 12_000
#: As many as are taken when there are more.
MANY_FILES = 65_536


def choose() -> tuple[int, int]:
    """The core of the servers and that of the load; the same when there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[1] if len(allowed) > 1 else allowed[0]


@contextlib.contextmanager
def on(core: int) -> Iterator[None]:
    """What is started inside the block runs on that core, and so does what it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_files() -> int:
    """Let this process and what it starts open more files; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if wanted < FILES:
        # Root may raise the hard limit too.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
            return FILES
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)
