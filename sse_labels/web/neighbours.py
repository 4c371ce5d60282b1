"""The other workers of this server, as the rooms of one process ask them.

Promises: a server of one process is asked in the same way; it has no neighbours.
Does not belong here: how workers reach each other (`workers.neighbours`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any


class Neighbours:
    """What a process knows that has none."""

    #: Which worker this process is, from 1; None: the server is one process.
    number: int | None = None

    def __init__(self) -> None:
        #: What answers a question, by its name; whoever knows the answer sets it.
        self.answers: dict[str, Callable[..., Any]] = {}

    async def ask(self, name: str, *arguments: Any) -> tuple[list[Any], list[int]]:
        """Return the answers of all workers, and the numbers of those that did not answer."""
        return [self.answers[name](*arguments)], []

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer the others' questions inside the block."""
        yield

    def hold(self, connections: int | None) -> None:
        """Tell the others how many connections are open here; None: no more are accepted."""

    def yields(self, *, full: bool) -> bool:
        """Return whether another worker should accept the next connection."""
        return False
