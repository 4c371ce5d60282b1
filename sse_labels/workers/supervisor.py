"""The first process: keeps the workers running, and serves nothing itself.

Promises:
- A worker that dies is replaced: at once when it has served for a while, and after growing pauses
  when it dies again and again. A worker that hangs is killed and so replaced.
- A worker that fails at the start of the server ends the server, as it ends a single process.
  Later a wrong setting ends the server only when no other worker serves.
- When the supervisor ends, every worker has ended. A worker that ends in time ends in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sse_labels.app import App
from sse_labels.backoff import Backoff
from sse_labels.config import Settings
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.errors import BrokenPromise, ConfigError, DatabaseRefused, SseLabelsError
from sse_labels.web.door.listening import base_urls, listening_sockets
from sse_labels.workers.job import (
    GRACE_SECONDS,
    READY,
    TURN_SECONDS,
    TURNING,
    Job,
    decode_error,
)
from sse_labels.workers.neighbours import new_words, words_in

log = logging.getLogger(__name__)

#: A worker that ran this long did not die of the cause of the death before.
STEADY_SECONDS = 10.0
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 10.0
#: A worker that is silent for this many heartbeats hangs. The time is kept within HANG_SECONDS:
#: a busy worker may be silent for some seconds, and heartbeats may be hours apart.
HANG_HEARTBEATS = 2
HANG_SECONDS = (5.0, 30.0)
#: Added before the first message: on a busy machine importing takes many seconds.
IMPORT_SECONDS = 60.0


@dataclass(frozen=True)
class End:
    """How a worker ended: its exit status (negative: the signal), and the error it reported."""

    status: int
    error: SseLabelsError | None = None

    def __str__(self) -> str:
        """Return the reason as a phrase."""
        if self.error is not None:
            return str(self.error)
        if self.status >= 0:
            return f"exit status {self.status}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.status).name
        return f"signal {-self.status}"


class Supervisor:
    """Keeps one worker running for each index."""

    def __init__(
        self,
        workers: int,
        launch: Callable[[int, int], Awaitable[WorkerProcess]],
        forget: Callable[[int], None],
        stopping: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`launch(index, replaced)` starts a worker; `replaced` have ended before it.

        `forget(index)` clears the counts of a worker that has ended. `stopping` is called before
        the first worker is stopped.
        """
        self._launch = launch
        self._forget = forget
        self._stopping = stopping
        self._clock = clock
        self._pause = pause
        self._workers = workers
        #: Indexes at which a worker has served, and at which one serves now.
        self._served: set[int] = set()
        self._serving: set[int] = set()
        #: Set when a worker has served at each index.
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event, serving: Callable[[], Awaitable[Any]]) -> None:
        """Keep all workers running until `stop` is set; await `serving` when all serve.

        Raises the error of a worker that is not to be replaced.
        """
        async with asyncio.TaskGroup() as tasks:
            keepers = [tasks.create_task(self._keep(index)) for index in range(self._workers)]
            reporting = tasks.create_task(self._report_ready(serving))
            try:
                await stop.wait()
            finally:
                self._stopping()
            for task in (reporting, *keepers):
                task.cancel()

    async def _report_ready(self, serving: Callable[[], Awaitable[Any]]) -> None:
        await self.ready.wait()
        await serving()

    async def _keep(self, index: int) -> None:
        backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
        for replaced in itertools.count():
            began = self._clock()
            end = await self._run_worker(index, replaced)
            self._check(index, end)
            if self._clock() - began >= STEADY_SECONDS:
                backoff.reset()
            wait = backoff.next()
            log.error(
                "a worker ended, another takes its place",
                extra={
                    "worker": index + 1,
                    "how": end,
                    "seconds": self._clock() - began,
                    "next_start_seconds": wait,
                },
            )
            await self._pause(wait)

    def _check(self, index: int, end: End) -> None:
        """Raise the error of a worker that is not to be replaced."""
        if isinstance(end.error, BrokenPromise | DatabaseRefused):
            raise end.error  # all workers use the same database and the same role
        if index not in self._served:
            # The server is starting: the user who started it reads the error and decides.
            raise end.error or SseLabelsError(f"worker {index + 1} did not start: {end}")
        if isinstance(end.error, ConfigError) and not self._serving:
            # For example a file that became wrong. Workers that have read it before serve on.
            raise end.error

    async def _run_worker(self, index: int, replaced: int) -> End:
        try:
            worker = await self._launch(index, replaced)
        except OSError as error:
            # Perhaps no memory or no descriptor is free now: the others serve on.
            return End(1, SseLabelsError(f"it cannot be started: {error}"))
        try:
            return await worker.ended(partial(self._serves, index))
        finally:
            self._serving.discard(index)
            # Does nothing when the worker has ended. Otherwise this task was cancelled, because
            # the server stops or because the error of another worker ends it.
            await worker.drained()
            self._forget(index)

    def _serves(self, index: int) -> None:
        self._served.add(index)
        self._serving.add(index)
        if len(self._served) == self._workers:
            self.ready.set()


class WorkerProcess:
    """The process of one worker."""

    def __init__(self, process: asyncio.subprocess.Process, settings: Settings) -> None:
        self._process = process
        self._drain_seconds = settings.drain_seconds
        least, most = HANG_SECONDS
        self._hang_seconds = min(most, max(least, HANG_HEARTBEATS * settings.heartbeat_seconds))

    @classmethod
    async def launch(cls, command: Sequence[str], job: Job) -> WorkerProcess:
        """Start the process and send it `job`."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(*job.listeners, job.words),
            # Ctrl-C reaches every process of the group; the supervisor ends this one.
            start_new_session=True,
        )
        assert process.stdin is not None  # noqa: S101 - a pipe was asked for
        log.info("a worker starts", extra={"worker": job.index + 1, "pid": process.pid})
        process.stdin.write(pickle.dumps(job))
        return cls(process, job.settings)

    async def ended(self, ready: Callable[[], None]) -> End:
        """Wait until the process has ended. Call `ready` when it serves; kill it when it hangs."""
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        error: SseLabelsError | None = None
        silent_seconds, line = -IMPORT_SECONDS, b"\n"
        while line:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    line = await self._process.stdout.readline()
            except TimeoutError:
                # Rounds of this loop are counted, not the clock: while this process or the machine
                # is suspended, no round passes
                # (test_time_in_which_the_supervisor_is_suspended_makes_nobody_hang).
                silent_seconds += TURN_SECONDS
                if silent_seconds - TURN_SECONDS < self._hang_seconds <= silent_seconds:
                    log.error(
                        "a worker hangs, it is killed",
                        extra={"pid": self._process.pid, "silent_seconds": silent_seconds},
                    )
                    self._process.kill()
                continue
            silent_seconds = 0.0
            if line == READY:
                ready()
            elif line != TURNING:
                # Another line than an error was written by accident.
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    error = decode_error(line)
        return End(await self._process.wait(), error)

    async def drained(self) -> None:
        """End the process by closing its input; kill it when that takes too long."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drain_seconds + GRACE_SECONDS):
                    await self._process.wait()
        finally:
            if self._process.returncode is None:
                log.error("a worker is killed, it does not end", extra={"pid": self._process.pid})
                self._process.kill()
                await self._process.wait()


async def serve(
    settings: Settings,
    dsn: str,
    publish_token: str | None,
    stop: asyncio.Event,
    ready: Callable[[int], Awaitable[Any]],
    *,
    command: Sequence[str],
    postgres: EmbeddedPostgres | None = None,
) -> None:
    """Serve with `settings.workers` processes until `stop` is set; otherwise like `app.serve`.

    `command` starts one worker. `postgres` is the embedded PostgreSQL; None with a DSN.
    """
    # Before the migration, as in a single process: a used port must end the start first.
    listeners = listening_sockets(settings)

    def close() -> None:
        for listener in listeners:
            listener.close()

    with contextlib.ExitStack() as closing:
        closing.callback(close)
        port = listeners[0].getsockname()[1]
        app = App(settings, dsn, publish_token)
        try:
            await app.prepare()
        finally:
            app.database.close()
        descriptor = new_words(settings.workers)
        closing.callback(os.close, descriptor)
        words = words_in(descriptor)
        # `prepare` has brought the schema up to date.
        share = replace(settings.of_one_worker(), migrate=False)
        run = secrets.token_hex(16)

        def forget(index: int) -> None:
            words[index] = 0

        def count_restart() -> None:
            words[-1] += 1

        if postgres is not None:
            postgres.on_restart = count_restart

        async def launch(index: int, replaced: int) -> WorkerProcess:
            numbers = tuple(listener.fileno() for listener in listeners)
            job = Job(index, replaced, share, dsn, publish_token, numbers, descriptor, run)
            return await WorkerProcess.launch(command, job)

        async def serving() -> None:
            address = base_urls(settings, port)
            log.info("serving", extra={"address": address, "workers": settings.workers})
            await ready(port)

        await Supervisor(settings.workers, launch, forget, close).run(stop, serving)
