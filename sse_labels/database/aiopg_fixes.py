"""Fixes for two errors of aiopg 1.4. Importing this module applies `SelectByPoll`.

Each fix names the test that fails without it. The fix for a third error stands in `Connection`:
aiopg raises CancelledError when the server cancels a query.
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
    """Replaces `select` in aiopg, which uses it to check whether a descriptor is still open.

    For descriptors above 1,023, `select.select` raises ValueError, which aiopg does not expect. A
    lost connection would then end a server with a thousand streams. Guarded by
    test_lost_database_is_survived_with_more_than_1024_descriptors.
    """

    @staticmethod
    def select(
        readers: list[int], writers: list[int], others: list[int], timeout: float
    ) -> tuple[list[int], list[int], list[int]]:
        """Raise OSError(EBADF) when one of `readers` is closed. aiopg ignores the result."""
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
    """Await `waiting`. Raise the CancelledError that it swallowed, after `undo(result)`.

    aiopg uses `asyncio.wait_for`. Before Python 3.12, `wait_for` returns the result and forgets a
    cancellation that arrives in the same step of the event loop. Then a server that must stop
    would follow its table forever. Guarded by
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
