"""What aiopg 1.4 gets wrong, and the fixes.

A third stands in `Connection`: aiopg raises CancelledError when the server cancels a query.

Each fix names the test that fails without it. Importing this module applies `SelectByPoll`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiopg.connection

T = TypeVar("T")


class SelectByPoll:
    """What aiopg asks `select` for: whether a descriptor is still open, beyond 1,023 too.

    `select.select` raises ValueError there, which aiopg does not expect: a lost connection would
    end the server as soon as it holds a thousand streams. Guarded by
    test_lost_database_is_survived_with_more_than_1024_descriptors.
    """

    @staticmethod
    def select(
        readers: list[int], writers: list[int], others: list[int], timeout: float
    ) -> tuple[list[int], list[int], list[int]]:
        """Raise OSError(EBADF) when one of `readers` is closed; nobody looks at the answer."""
        poll = select.poll()
        for descriptor in readers:
            poll.register(descriptor, select.POLLIN)
        if any(seen & select.POLLNVAL for _, seen in poll.poll(1000 * timeout)):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return [], [], []


aiopg.connection.select = SelectByPoll  # type: ignore[attr-defined,assignment]


async def keep_cancellation(
    waiting: Awaitable[T], undo: Callable[[T], object] = lambda result: None
) -> T:
    """Await `waiting`; raise the CancelledError that it swallowed, after `undo(result)`.

    aiopg waits by `asyncio.wait_for`, which before Python 3.12 returns the result and forgets
    the cancellation when both arrive in the same step of the event loop. A server that was told
    to stop then follows its table for ever. Guarded by
    test_cancellation_that_comes_together_with_the_answer_is_not_lost.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        result = await waiting
    except Exception as error:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task is not None and task.cancelling() > before:
        undo(result)
        raise asyncio.CancelledError
    return result
