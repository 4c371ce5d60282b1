"""The first process: keeps the workers running, and serves nothing itself.

Promises: a worker that dies is replaced, at once when it had served for a while, and ever
more slowly when it dies again and again; one that hangs is killed, and so replaced; one that
cannot even begin ends the server when it starts, as it ends a single process, and later only
when no other worker serves; when the supervisor ends every worker has ended, in order if it
could within its time.
Does not belong here: what a worker does; signals.
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

#: Who has served for so long died of something new.
STEADY_SECONDS = 10.0
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 10.0
#: A worker hangs that is silent for so many heartbeats, within these bounds in seconds: a busy one
#: may be silent for some, and without heartbeats nobody should wait for hours.
HANG_HEARTBEATS = 2
HANG_SECONDS = (5.0, 30.0)
#: Before its first word it may take longer: on a busy machine importing takes many seconds.
IMPORT_SECONDS = 60.0


@dataclass(frozen=True)
class End:
    """How a worker ended: its exit status (negative: the signal), and what it said."""

    status: int
    error: SseLabelsError | None = None

    def __str__(self) -> str:
        """Return it in words."""
        if self.error is not None:
            return str(self.error)
        if self.status >= 0:
            return f"exit status {self.status}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.status).name
        return f"signal {-self.status}"


class Supervisor:
    """Keeps one worker in each place."""

    def __init__(
        self,
        places: int,
        launch: Callable[[int, int], Awaitable[WorkerProcess]],
        forget: Callable[[int], None],
        stopping: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`launch` starts one for a place, saying how many it has replaced there.

        `forget` frees what one held, `stopping` is called before the first is told to end.
        """
        self._launch = launch
        self._forget = forget
        self._stopping = stopping
        self._clock = clock
        self._pause = pause
        self._places = places
        #: Places in which one has served, and those in which one does.
        self._served: set[int] = set()
        self._serving: set[int] = set()
        #: Set once all have served.
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event, serving: Callable[[], Awaitable[Any]]) -> None:
        """Keep all running until `stop` is set; `serving` is awaited once all serve.

        Raises what makes it senseless to replace one.
        """
        async with asyncio.TaskGroup() as tasks:
            keepers = [tasks.create_task(self._keep(place)) for place in range(self._places)]
            telling = tasks.create_task(self._tell(serving))
            try:
                await stop.wait()
            finally:
                self._stopping()
            for task in (telling, *keepers):
                task.cancel()

    async def _tell(self, serving: Callable[[], Awaitable[Any]]) -> None:
        await self.ready.wait()
        await serving()

    async def _keep(self, place: int) -> None:
        backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
        for replaced in itertools.count():
            began = self._clock()
            end = await self._live(place, replaced)
            self._check(place, end)
            if self._clock() - began >= STEADY_SECONDS:
                backoff.reset()
            wait = backoff.next()
            log.error(
                "a worker ended, another takes its place",
                extra={
                    "worker": place + 1,
                    "how": end,
                    "seconds": self._clock() - began,
                    "next_start_seconds": wait,
                },
            )
            await self._pause(wait)

    def _check(self, place: int, end: End) -> None:
        """Raise when no other worker shall take the place."""
        if isinstance(end.error, BrokenPromise | DatabaseRefused):
            raise end.error  # all have streamed from the same database, by the same role
        if place not in self._served:
            # The server only starts: to try again is for who started it, and can read why.
            raise end.error or SseLabelsError(f"worker {place + 1} did not start: {end}")
        if isinstance(end.error, ConfigError) and not self._serving:
            # A file that went bad, say: who has read it before serves on, as a single process does.
            raise end.error

    async def _live(self, place: int, replaced: int) -> End:
        try:
            worker = await self._launch(place, replaced)
        except OSError as error:
            # No memory, no descriptor, for now: the others serve on.
            return End(1, SseLabelsError(f"it cannot be started: {error}"))
        try:
            return await worker.ended(partial(self._serves, place))
        finally:
            self._serving.discard(place)
            # Does nothing to one that has ended. Else we are cancelled: told to stop, or because
            # another worker's end is everybody's.
            await worker.drained()
            self._forget(place)

    def _serves(self, place: int) -> None:
        self._served.add(place)
        self._serving.add(place)
        if len(self._served) == self._places:
            self.ready.set()


class WorkerProcess:
    """A worker as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, settings: Settings) -> None:
        self._process = process
        self._drain_seconds = settings.drain_seconds
        least, most = HANG_SECONDS
        self._hang_seconds = min(most, max(least, HANG_HEARTBEATS * settings.heartbeat_seconds))

    @classmethod
    async def launch(cls, command: Sequence[str], job: Job) -> WorkerProcess:
        """Start one."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(*job.listeners, job.words),
            # Ctrl-C reaches every process of the group; this one is told by us.
            start_new_session=True,
        )
        assert process.stdin is not None  # noqa: S101 - a pipe was asked for
        log.info("a worker starts", extra={"worker": job.index + 1, "pid": process.pid})
        process.stdin.write(pickle.dumps(job))
        return cls(process, job.settings)

    async def ended(self, ready: Callable[[], None]) -> End:
        """Return when it has ended; call `ready` when it serves. Kill it when it hangs."""
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        error: SseLabelsError | None = None
        silent_seconds, line = -IMPORT_SECONDS, b"\n"
        while line:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    line = await self._process.stdout.readline()
            except TimeoutError:
                # Our turns are counted, not time: while we or the machine are suspended none pass
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
                # What is no error of ours was written by accident.
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    error = decode_error(line)
        return End(await self._process.wait(), error)

    async def drained(self) -> None:
        """Have it end, by closing its input; kill it when that takes too long."""
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
    """Serve by `settings.workers` processes until `stop` is set; as `app.serve` otherwise.

    `command` starts one worker; `postgres` is the embedded one, when the labels are there.
    """
    # As in a single process: a port that is taken should not cost a migration.
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
