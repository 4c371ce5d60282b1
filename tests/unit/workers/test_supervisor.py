"""The supervisor with workers that are no processes: when they are replaced, and when not."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sse_labels.config import Settings
from sse_labels.errors import (
    BrokenPromise,
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    SchemaError,
)
from sse_labels.workers.job import READY, TURNING, Job, decode_error, encode_error
from sse_labels.workers.supervisor import (
    FIRST_WAIT_SECONDS,
    IMPORT_SECONDS,
    LONGEST_WAIT_SECONDS,
    STEADY_SECONDS,
    End,
    Supervisor,
    WorkerProcess,
)

from support.virtual_time import virtual_time


class Fake:
    """A worker that ends when the test says so."""

    def __init__(self, place: int, replaced: int) -> None:
        self.place = place
        self.replaced = replaced
        self.end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.ready: Callable[[], None] | None = None
        self.was_drained = False

    async def ended(self, ready: Callable[[], None]) -> End:
        self.ready = ready
        return await self.end

    async def drained(self) -> None:
        self.was_drained = True


@dataclass
class Stage:
    """A supervisor of `places`, its clock, and what it did."""

    places: int = 2
    now: float = 0.0
    launched: list[Fake] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def launch(self, place: int, replaced: int) -> Fake:
        self.launched.append(Fake(place, replaced))
        return self.launched[-1]

    async def pause(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def serving(self) -> None:
        self.events.append("serving")

    def run(self) -> asyncio.Future[None]:
        supervisor = Supervisor(
            self.places,
            self.launch,
            self.forgotten.append,
            lambda: self.events.append("stopping"),
            clock=lambda: self.now,
            pause=self.pause,
        )
        return asyncio.ensure_future(supervisor.run(self.stop, self.serving))

    async def settle(self) -> None:
        """Let everything run that can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def serve(self) -> None:
        """Let the workers serve that were launched so far."""
        await self.settle()
        for worker in self.launched:
            if worker.ready is not None and not worker.end.done():
                worker.ready()

    async def die(self, worker: Fake, end: End | None = None, *, after: float = 0.0) -> Fake:
        """End a worker that served for so long; return the one that took its place."""
        await self.serve()
        self.now += after
        worker.end.set_result(end or End(-9))
        await self.settle()
        return self.launched[-1]


async def test_it_serves_once_all_do_and_stops_when_all_have_ended() -> None:
    stage = Stage()
    running = stage.run()
    await stage.settle()
    first, second = stage.launched
    assert [worker.replaced for worker in stage.launched] == [0, 0]
    assert first.ready is not None
    assert second.ready is not None
    first.ready()
    first.ready()
    await stage.settle()
    assert stage.events == []
    second.ready()
    await stage.settle()
    assert stage.events == ["serving"]
    stage.stop.set()
    await running
    assert stage.events == ["serving", "stopping"]
    assert first.was_drained
    assert second.was_drained
    assert sorted(stage.forgotten) == [0, 1]


async def test_dead_worker_is_forgotten_and_replaced_in_its_place() -> None:
    stage = Stage()
    running = stage.run()
    await stage.settle()
    again = await stage.die(stage.launched[1])
    assert (again.place, again.replaced) == (1, 1)
    assert stage.forgotten == [1]
    assert len(stage.launched) == 3
    assert not stage.launched[0].was_drained
    stage.stop.set()
    await running


async def test_waits_grow_while_it_dies_at_once_and_begin_anew_after_it_has_served() -> None:
    stage = Stage(places=1)
    running = stage.run()
    await stage.settle()
    worker = stage.launched[0]
    for _ in range(12):
        worker = await stage.die(worker)
    ceiling = FIRST_WAIT_SECONDS
    for wait in stage.waits:
        assert ceiling / 2 <= wait <= ceiling
        ceiling = min(LONGEST_WAIT_SECONDS, 2 * ceiling)
    assert ceiling == LONGEST_WAIT_SECONDS
    # A little more: its clock is a sum of waits, and rounds.
    await stage.die(worker, after=STEADY_SECONDS + 0.001)
    assert stage.waits[-1] <= FIRST_WAIT_SECONDS
    stage.stop.set()
    await running


@pytest.mark.parametrize(
    "error",
    [
        BrokenPromise("it went back"),
        ConfigError("--port", 1, "x"),
        SchemaError("s", 3, "x"),
        DatabaseUnavailable("cannot connect"),
        DatabaseRefused("permission denied"),
    ],
)
async def test_worker_that_ends_before_it_ever_served_ends_all(error: Exception) -> None:
    stage = Stage()
    running = stage.run()
    await stage.settle()
    assert stage.launched[1].ready is not None
    stage.launched[1].ready()
    stage.launched[0].end.set_result(End(1, error))
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert caught.value.exceptions == (error,)
    assert stage.launched[1].was_drained
    assert stage.events == ["stopping"]
    assert len(stage.launched) == 2


async def test_process_that_ends_before_it_ever_served_is_named() -> None:
    stage = Stage()
    running = stage.run()
    await stage.settle()
    stage.launched[1].end.set_result(End(7))
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert [str(error) for error in caught.value.exceptions] == [
        "worker 2 did not start: exit status 7"
    ]


@pytest.mark.parametrize(
    "error", [BrokenPromise("it went back"), DatabaseRefused("permission denied")]
)
async def test_what_is_true_of_all_workers_ends_all_that_serve(error: Exception) -> None:
    stage = Stage()
    running = stage.run()
    await stage.serve()
    stage.launched[0].end.set_result(End(1, error))
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert caught.value.exceptions == (error,)
    assert stage.launched[1].was_drained


async def test_what_keeps_one_from_starting_again_ends_all_once_nobody_serves() -> None:
    stage, error = Stage(), ConfigError("--jwt-key-file", "key.pem", "a key")
    running = stage.run()
    await stage.settle()
    again = await stage.die(stage.launched[0])
    again.end.set_result(End(2, error))
    await stage.settle()
    again = stage.launched[-1]
    assert len(stage.launched) == 4
    assert not stage.launched[1].was_drained
    stage.launched[1].end.set_result(End(-9))
    again.end.set_result(End(2, error))
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert caught.value.exceptions == (error,)


async def test_database_that_is_away_is_waited_for() -> None:
    stage = Stage(places=1)
    running = stage.run()
    await stage.settle()
    again = await stage.die(stage.launched[0], End(1, DatabaseUnavailable("cannot connect")))
    assert again.replaced == 1
    stage.stop.set()
    await running


async def test_machine_that_can_start_none_now_is_asked_again() -> None:
    stage = Stage(places=1)
    launch, refused = stage.launch, []

    async def launch_later(place: int, replaced: int) -> Fake:
        if refused:
            raise refused.pop()
        return await launch(place, replaced)

    stage.launch = launch_later  # type: ignore[method-assign]
    running = stage.run()
    await stage.settle()
    refused += [OSError("no memory"), OSError("no memory")]
    await stage.die(stage.launched[0])
    assert len(stage.launched) == 2
    assert len(stage.waits) == 3
    stage.stop.set()
    await running


async def test_told_to_stop_in_the_midst_of_a_wait_it_starts_no_other() -> None:
    stage = Stage(places=1)
    waiting = asyncio.Event()

    async def wait_for_ever(seconds: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    stage.pause = wait_for_ever  # type: ignore[method-assign]
    running = stage.run()
    await stage.serve()
    stage.launched[0].end.set_result(End(-9))
    await waiting.wait()
    stage.stop.set()
    await running
    assert len(stage.launched) == 1


class Silent:
    """A process that says what the test says, and ends when it is killed."""

    pid = 7

    def __init__(self) -> None:
        self.stdout = asyncio.StreamReader()
        self.was_killed = asyncio.Event()

    def kill(self) -> None:
        self.was_killed.set()
        self.stdout.feed_eof()

    async def wait(self) -> int:
        await self.was_killed.wait()
        return -9


@pytest.mark.parametrize(("heartbeat", "seconds"), [(15.0, 30), (1.0, 5), (4.0, 8), (3600.0, 30)])
@virtual_time
async def test_worker_that_says_nothing_any_more_is_killed(heartbeat: float, seconds: int) -> None:
    fake = Silent()
    process = WorkerProcess(fake, Settings(heartbeat_seconds=heartbeat))  # type: ignore[arg-type]
    ended = asyncio.ensure_future(process.ended(lambda: None))
    # Importing takes its time.
    await asyncio.sleep(IMPORT_SECONDS)
    for line in (READY, TURNING, TURNING):
        fake.stdout.feed_data(line)
        await asyncio.sleep(seconds - 0.5)
    assert not fake.was_killed.is_set()
    await asyncio.sleep(1)
    assert fake.was_killed.is_set()
    assert str(await ended) == "SIGKILL"


@virtual_time
async def test_time_in_which_the_supervisor_is_suspended_makes_nobody_hang() -> None:
    fake = Silent()
    process = WorkerProcess(fake, Settings(heartbeat_seconds=1))  # type: ignore[arg-type]
    ended = asyncio.ensure_future(process.ended(lambda: None))
    loop = asyncio.get_running_loop()
    for _ in range(10):
        fake.stdout.feed_data(TURNING)
        await asyncio.sleep(0.5)
        loop.now += 3600  # type: ignore[attr-defined]
    assert not fake.was_killed.is_set()
    fake.kill()
    await ended


@pytest.mark.parametrize(
    ("end", "words"),
    [(End(-9), "SIGKILL"), (End(3), "exit status 3"), (End(-99), "signal 99"),
     (End(1, BrokenPromise("it went back")), "it went back")],
)  # fmt: skip
def test_an_end_is_said_in_words(end: End, words: str) -> None:
    assert str(end) == words


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("--port", 80, "a free port"),
        SchemaError("the database's schema", 9, "at most 3"),
        ConfigError("--data-dir", None, "a directory"),
        BrokenPromise("the database went back: é"),
        DatabaseUnavailable("cannot connect"),
        DatabaseRefused("permission denied"),
    ],
)
def test_an_error_keeps_its_class_and_its_words(error: Exception) -> None:
    again = decode_error(encode_error(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_a_job_arrives_whole(tmp_path) -> None:
    job = Job(1, 3, Settings(workers=2), "host=db password=geheim", "token", (5, 6), 7, "run")
    file = tmp_path / "pipe"
    for sent, read in ((pickle.dumps(job), job), (b"", None), (pickle.dumps(job)[:9], None)):
        file.write_bytes(sent)
        with file.open("rb") as pipe:
            assert Job.read(pipe) == read
    assert job.name == "worker-2"
