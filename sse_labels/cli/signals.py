"""Stops a command at SIGTERM, SIGHUP or Ctrl-C.

Promises: at the first signal a server drains, at the second it ends at once. A signal that is
ignored, as nohup ignores SIGHUP, stays ignored.
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

#: The signals that stop a server. SIGHUP: its terminal was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Ready = Callable[[int], Awaitable[Any]]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let each of SIGNALS end the block as Ctrl-C does, by KeyboardInterrupt."""
    on_signals(interrupt)
    yield


@contextlib.contextmanager
def first_signal_held_back() -> Iterator[None]:
    """Hold the first signal back until the block has ended.

    An interrupt while PostgreSQL starts would leave it half started.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    on_signals(note)
    yield
    on_signals(interrupt)
    if received:
        raise KeyboardInterrupt


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as Python does at SIGINT."""
    raise KeyboardInterrupt


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set the handler of SIGNALS."""
    for number in SIGNALS:
        # nohup ignores SIGHUP; that must stay so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def run_until_signal(
    serve: Callable[[asyncio.Event, Ready], Awaitable[None]], ready: Ready | None = None
) -> None:
    """Run `serve(stop, up)`; set `stop` at the first signal. Raises the error that ends it earlier.

    `serve` awaits `up` with its port when it serves; then `ready` is awaited.
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
                task.cancel()  # a second signal, or nothing to drain yet: do not wait
            stop.set()

        def on_signal(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the program ends already
                loop.call_soon_threadsafe(drain)

        # Not loop.add_signal_handler: when the loop is closed it sets SIG_DFL, and a SIGTERM after
        # that would end this process before PostgreSQL is stopped.
        on_signals(on_signal)
        await serve(stop, up)

    try:
        asyncio.run(serving())
    except asyncio.CancelledError:
        pass  # by `drain`
    except BaseExceptionGroup as group:
        ours, others = group.split(SseLabelsError)
        # The failure of one task ends all. The operator needs the message of that one.
        first: BaseException = group if ours is None else ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if others is not None:
            log.critical("a part of the server failed, which ends it", extra={"error": repr(first)})
            raise
        raise first from None
