"""One worker: the whole application, as one of several.

Promises: it serves like a single process, and lets the others read what it counts.
Does not belong here: signals, exit statuses.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from sse_labels import app as application
from sse_labels.app import App
from sse_labels.metrics import Metrics
from sse_labels.shared import Memory
from sse_labels.workers.job import GRACE_SECONDS, TURN_SECONDS, Job, when_the_supervisor_ends

log = logging.getLogger(__name__)

#: How old what a neighbour shows may be, and what the counts lose of a worker that is killed.
SHOW_SECONDS = 0.25


async def serve(
    job: Job,
    pipe: int,
    turning: Callable[[], None],
    stop: asyncio.Event,
    ready: Callable[[int], Awaitable[Any]],
) -> None:
    """Do `job` until `stop` is set or the supervisor, at the other end of `pipe`, ends.

    `turning` is called each second, while the event loop turns.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    serves = False

    async def up(port: int) -> None:
        nonlocal serves
        serves = True
        await ready(port)

    def drain() -> None:
        if task is not None and not (serves or stop.is_set()):
            task.cancel()  # nothing to drain yet: wait for no database
        stop.set()

    when_the_supervisor_ends(
        pipe,
        lambda: loop.call_soon_threadsafe(drain),
        job.settings.drain_seconds + GRACE_SECONDS,
    )
    workers = job.settings.workers
    settings = replace(
        job.settings,
        # The supervisor has done it.
        migrate=False,
        # Not counted together: a read waits for its turn here, and is refused nowhere.
        backfill_max_reads=max(1, job.settings.backfill_max_reads // workers),
    )
    memory = Memory(job.memory, workers)
    app = App(
        settings,
        job.dsn,
        job.publish_token,
        share=memory.share(job.index),
        listeners=[socket.socket(fileno=number) for number in job.listeners],
    )
    app.metrics.count["workers_replaced"] += job.replaces
    async with asyncio.TaskGroup() as tasks:
        others = [
            tasks.create_task(show(app.metrics, memory)),
            tasks.create_task(say_each_second(turning)),
        ]
        try:
            await application.serve(app, stop, up)
        finally:
            for task in others:
                task.cancel()
            app.metrics.show()


async def show(metrics: Metrics, memory: Memory) -> None:
    """Let the other workers read what this one counts, until cancelled."""
    while True:
        metrics.count["embedded_restarts"] = memory.restarts[0]
        metrics.show()
        await asyncio.sleep(SHOW_SECONDS)


async def say_each_second(turning: Callable[[], None]) -> None:
    """Call `turning` until cancelled."""
    while True:
        turning()
        await asyncio.sleep(TURN_SECONDS)
