"""The interface for questions to the other workers of this server.

Promises: a server with one process has the same interface, and no neighbours.
Does not belong here: the communication between workers (`workers.neighbours`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any


class Neighbours:
    """The neighbours of a process that has none."""

    #: The number of this worker, from 1. None: the server has one process.
    number: int | None = None

    def __init__(self) -> None:
        #: The functions that answer questions, by the name of the question. Handlers add theirs.
        self.answers: dict[str, Callable[..., Any]] = {}

    async def ask(self, name: str, *arguments: Any) -> tuple[list[Any], list[int]]:
        """Return the answers of all workers, and the numbers of those that did not answer."""
        return [self.answers[name](*arguments)], []

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer the others' questions inside the block."""
        yield

    def hold(self, connections: int | None) -> None:
        """Report the open connections of this worker. None: it accepts no more connections."""

    def yields(self, *, full: bool) -> bool:
        """Return whether another worker should accept the next connection."""
        return False

    def accepted(self) -> None:
        """Note that another worker accepted the connection for which this worker yielded."""
