"""How a command hears that it is told to stop: SIGTERM, SIGHUP, Ctrl-C.

Promises: the first signal lets a server drain, the second ends it at once; a signal that is ignored
stays ignored, as nohup wants it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

from sse_labels.errors import SseLabelsError

log = logging.getLogger(__name__)

#: What tells a server to stop. SIGHUP: its terminal was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Ready = Callable[[int], Awaitable[Any]]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let whatever tells this process to stop end the block as Ctrl-C does."""
    on_signals(interrupt)
    yield


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Hold a first signal back until the block is done.

    A server that was interrupted while PostgreSQL starts would leave it half started.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    on_signals(note)
    yield
    on_signals(interrupt)
    if told:
        raise KeyboardInterrupt


def interrupt(number: int, frame: FrameType | None) -> None:
    """Do at any signal what Python does at SIGINT."""
    raise KeyboardInterrupt


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set what happens from now on when this process is told to stop."""
    for number in SIGNALS:
        # Left alone when ignored: that is what nohup does.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def until_told(
    serve: Callable[[asyncio.Event, Ready], Awaitable[None]], ready: Ready | None = None
) -> None:
    """Run `serve(stop, up)`, and have it stop at the first signal; raise what ended it otherwise.

    It awaits `up` with the port once it serves; `ready` is awaited then.
    """

    async def serving() -> None:
        stop = asyncio.Event()
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        serves = False

        async def up(port: int) -> None:
            nonlocal serves
            serves = True
            if ready is not None:
                await ready(port)

        def drain() -> None:
            if task is not None and (stop.is_set() or not serves):
                task.cancel()  # told twice, or nothing to drain yet: wait for nobody
            stop.set()

        def told(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, we are leaving already
                loop.call_soon_threadsafe(drain)

        # Not loop.add_signal_handler: it leaves SIG_DFL behind, and a SIGTERM that came then
        # would end us before PostgreSQL is stopped.
        on_signals(told)
        await serve(stop, up)

    try:
        asyncio.run(serving())
    except asyncio.CancelledError:
        pass  # by `drain`
    except BaseExceptionGroup as group:
        ours, others = group.split(SseLabelsError)
        # One task's failure ends all; its sentence is what the operator needs.
        first: BaseException = group if ours is None else ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if others is not None:
            log.critical("a part of the server failed, which ends it", extra={"error": repr(first)})
            raise
        raise first from None
