"""One worker: the whole application, as one of several.

Promises: a worker serves like a single process.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from sse_labels import app as application
from sse_labels.app import App
from sse_labels.workers.job import GRACE_SECONDS, TURN_SECONDS, Job, when_the_supervisor_ends
from sse_labels.workers.neighbours import Neighbours, words_in


async def serve(
    job: Job,
    pipe: int,
    turning: Callable[[], None],
    stop: asyncio.Event,
    ready: Callable[[int], Awaitable[Any]],
) -> None:
    """Do `job` until `stop` is set, or until the supervisor at the other end of `pipe` ends.

    `turning` is called each second, as long as the event loop runs.
    """
    loop = asyncio.get_running_loop()

    def drain() -> None:
        if not stop.is_set():  # a second signal would end it without draining
            signal.raise_signal(signal.SIGTERM)

    when_the_supervisor_ends(
        pipe,
        lambda: loop.call_soon_threadsafe(drain),
        job.settings.drain_seconds + GRACE_SECONDS,
    )
    words = words_in(job.words)
    app = App(
        job.settings,
        job.dsn,
        job.publish_token,
        neighbours=Neighbours(job.index, words, job.run),
        listeners=[socket.socket(fileno=number) for number in job.listeners],
    )
    app.metrics.count["workers_replaced"] = job.replaced

    async def turn() -> None:
        while True:
            turning()
            if job.index == 0:  # only one worker, because the counts of all workers are added
                app.metrics.count["embedded_restarts"] = words[-1]
            await asyncio.sleep(TURN_SECONDS)

    async with asyncio.TaskGroup() as tasks:
        turns = tasks.create_task(turn())
        try:
            await application.serve(app, stop, ready)
        finally:
            turns.cancel()
