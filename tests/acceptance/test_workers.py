"""`sse-labels serve --workers 2`: one server of two processes, also when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sse_labels.cli.place import database_of
from sse_labels.config import Settings
from sse_labels.embedded import EmbeddedPostgres
from sse_labels.protocol.signatures import SigningKey
from sse_labels.publishing.tokens import add_token

from support.database import TestDatabase, reachable_directory, until
from support.program import (
    QUICK_SERVER,
    REPOSITORY,
    Program,
    command,
    environment,
    failure,
    free_port,
    postgres_runs_in,
    ran,
    running,
)
from support.reading import Reader, reading

TOKEN = "a-token-for-tests"
LABEL = {
    "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
    "uri": "at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/3k",
    "val": "spam",
    "cts": "2026-01-01T00:00:00.000Z",
}


@contextlib.contextmanager
def two_workers(*arguments: str) -> Iterator[Program]:
    env = {"SSE_LABELS_PUBLISH_TOKEN": TOKEN, "SSE_LABELS_WORKERS": "2"}
    with running("serve", *QUICK_SERVER, *arguments, env=env) as server:
        yield server


async def url_of(server: Program) -> str:
    """The address, once both workers serve."""
    return (await asyncio.to_thread(server.wait_for, r"serving: address=(\S+) workers=2$"))[1]


def pids(server: Program) -> dict[int, int]:
    """The worker that was started last, in each place."""
    found = re.findall(r"a worker starts: worker=(\d) pid=(\d+)$", server.errors, re.MULTILINE)
    return {int(worker): int(pid) for worker, pid in found}


async def streams_by_worker(server: Program, count: int) -> Counter[str]:
    """Who has opened how many of `count` streams: the log comes later than their first bytes."""

    def told() -> Counter[str]:
        return Counter(re.findall(r" (worker-\d) .*: stream opened: ", server.errors))

    await asyncio.to_thread(server.wait_until, lambda: told().total() >= count, "stream opened")
    return told()


async def get(url: str, **headers: str) -> httpx.Response:
    """Ask on a connection of its own, so that any of the workers may answer."""
    async with httpx.AsyncClient(timeout=20, verify=False) as client:
        return await client.get(url, headers=headers)


async def scrape(url: str) -> dict[str, float]:
    """The metrics as any worker shows them: each one's, named with its number, and their sums."""
    answer = await get(f"{url}/metrics")
    shown: Counter[str] = Counter()
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            worker = sample.labels["worker"]
            name = sample.name.removeprefix("sse_labels_")
            name += "".join(value for key, value in sample.labels.items() if key != "worker")
            shown[name + worker] = sample.value
            shown[name] += sample.value
    return shown


async def until_shown(url: str, **expected: float) -> dict[str, float]:
    """Scrape until all of `expected` is shown."""
    async with asyncio.timeout(20):
        while True:
            shown = await scrape(url)
            if all(shown.get(name) == value for name, value in expected.items()):
                return shown
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def streams(url: str, count: int, **query: object) -> AsyncIterator[list[Reader]]:
    """Open so many, one after another."""
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(count):
            readers.append(await stack.enter_async_context(reading(f"{url}/stream", **query)))
            await readers[-1].until_opened()
        yield readers


async def test_streams_are_spread_each_gets_every_label_and_metrics_are_of_all_workers(
    database: TestDatabase,
) -> None:
    database.fill(50)
    limits = ("--max-connections=200", "--max-streams=100", "--retention-max-labels=1000")
    with two_workers("--dsn", database.dsn, *limits) as server:
        url = await url_of(server)
        async with streams(url, 16, cursor=0) as readers:
            database.fill(30)
            stored = database.stored()
            for reader in readers:
                assert await reader.until_events(80) == stored
            spread = await streams_by_worker(server, 16)
            assert sum(spread.values()) == 16
            assert set(spread) == {"worker-1", "worker-2"}
            assert min(spread.values()) >= 4
            shown = await until_shown(
                url,
                streams=16,
                # The one that asks is one of them.
                connections=17,
                events_delivered_total=16 * 80,
                events_followed_total=2 * 30,
                connections_limit=200,
                streams_limit=100,
                streams_limit1=50,
            )
            for worker in (1, 2):
                assert 0 < shown[f"process_open_fds{worker}"] < shown[f"process_max_fds{worker}"]
                assert shown[f"process_resident_memory_bytes{worker}"] > 1024**2
                assert 0 <= shown[f"sweep_age_seconds{worker}"] < 60
            assert shown["head_seq1"] == shown["head_seq2"] == 80
            assert shown["following1"] == shown["following2"] == 1
            assert await asyncio.to_thread(server.end) == 0
            for reader in readers:
                await reader.until_closed()
                assert reader.news[-1][1]["error"] == "ServerStopping"
                assert reader.events == stored
    assert "Traceback" not in server.errors
    assert "killed" not in server.errors


async def test_killed_worker_is_replaced_and_its_consumers_lose_nothing(
    database: TestDatabase,
) -> None:
    database.fill(20)
    with two_workers("--dsn", database.dsn) as server:
        url = await url_of(server)
        async with streams(url, 10, cursor=0) as readers:
            for reader in readers:
                await reader.until_events(20)
            await until_shown(url, events_delivered_total=200, streams=10)
            of_first = (await streams_by_worker(server, 10))["worker-1"]
            server_pids = pids(server)
            os.kill(server_pids[1], signal.SIGKILL)
            database.fill(20)
            cut = []
            for reader in readers:
                try:
                    await reader.until_events(40)
                except httpx.RemoteProtocolError:
                    cut.append(reader)
            assert len(cut) == of_first > 0
            await until_shown(url, streams=10 - of_first)
            for reader in cut:
                async with reading(f"{url}/stream", last_event_id=reader.last_id) as again:
                    reader.events += await again.until_seq(40)
            for reader in readers:
                assert reader.events == database.stored()
            await asyncio.to_thread(
                server.wait_until, lambda: server.errors.count("worker-1 sse_labels.app: serv") == 2
            )
            assert pids(server)[1] != server_pids[1]
            assert pids(server)[2] == server_pids[2]
            shown = await until_shown(url, workers_replaced_total1=1, head_seq1=40)
            # The one that lives has counted on, the other began again; either may have read on.
            assert shown["events_delivered_total"] == 40 * (10 - of_first) + 20 * of_first
            assert shown["events_delivered_total2"] >= 40 * (10 - of_first)
        assert await asyncio.to_thread(server.end) == 0
    assert "another takes its place: worker=1 how=SIGKILL " in server.errors
    assert "Traceback" not in server.errors


async def test_worker_that_hangs_is_replaced_and_its_consumers_lose_nothing(
    database: TestDatabase,
) -> None:
    database.fill(20)
    with two_workers("--dsn", database.dsn, "--heartbeat-seconds=1") as server:
        url = await url_of(server)
        async with streams(url, 8, cursor=0) as readers:
            for reader in readers:
                await reader.until_events(20)
            of_second = (await streams_by_worker(server, 8))["worker-2"]
            hanging = pids(server)[2]
            os.kill(hanging, signal.SIGSTOP)
            database.fill(20)
            cut = []
            for reader in readers:
                try:
                    await reader.until_events(40)
                except httpx.RemoteProtocolError:
                    cut.append(reader)
            assert len(cut) == of_second > 0
            for reader in cut:
                async with reading(f"{url}/stream", last_event_id=reader.last_id) as again:
                    reader.events += await again.until_seq(40)
            for reader in readers:
                assert reader.events == database.stored()
            await until_shown(url, workers_replaced_total=1, head_seq2=40)
        assert await asyncio.to_thread(server.end) == 0
    assert f"a worker hangs, it is killed: pid={hanging} silent_seconds=5" in server.errors
    assert "another takes its place: worker=2 how=SIGKILL " in server.errors
    assert server.errors.count("a worker hangs") == 1
    assert "Traceback" not in server.errors


async def test_all_workers_together_hold_no_more_than_the_limits(database: TestDatabase) -> None:
    limits = ("--max-streams=6", "--max-per-address=4", "--max-connections=16",
              "--publish-rate-labels=2", "--publish-burst-labels=10")  # fmt: skip
    with two_workers("--dsn", database.dsn, *limits) as server:
        url = await url_of(server)
        greedy = {"X-Forwarded-For": "203.0.113.9"}
        async with contextlib.AsyncExitStack() as stack:

            async def opened(**headers: str) -> int:
                """Open one more stream, on a connection of its own; return the status."""
                client = await stack.enter_async_context(httpx.AsyncClient(verify=False))
                answer = await stack.enter_async_context(
                    client.stream("GET", f"{url}/stream", headers=headers)
                )
                if answer.status_code != 200:
                    await client.aclose()
                return answer.status_code

            # Each worker lets in its half; which one is asked is chance.
            statuses: list[int] = []
            async with asyncio.timeout(20):
                while statuses.count(200) < 4:
                    statuses.append(await opened(**greedy))
                statuses += [await opened(**greedy) for _ in range(4)]
                assert (statuses.count(200), {*statuses}) == (4, {200, 429})
                statuses = []
                while statuses.count(200) < 2:
                    statuses.append(await opened())
                statuses += [await opened() for _ in range(4)]
                assert (statuses.count(200), {*statuses}) == (2, {200, 503})
            # An idle connection is one too.
            idle: list[asyncio.StreamWriter] = []
            async with asyncio.timeout(20):
                while True:
                    answers = [await get(f"{url}/health/live") for _ in range(4)]
                    # Ten places are left of 16. A full worker may refuse some while the other one
                    # is busy, so four refusals alone do not say that both are full.
                    if len(idle) >= 10 and all(answer.status_code == 503 for answer in answers):
                        break
                    # One that was refused meanwhile holds nothing, so there may be more than fit.
                    idle.append((await asyncio.open_connection(*address_of(url)))[1])
                    stack.callback(idle[-1].close)
            assert "8 connections are open" in answers[0].json()["message"]
            for writer in idle:
                writer.close()
            await until_live(url)
            assert len(await streams_by_worker(server, 6)) == 2

        # A burst is each worker's, as a request of so many labels is.
        published = 0
        async with asyncio.timeout(20):
            while published < 2:
                published += await publish(url, 10) == 201
        statuses = [await publish(url, 10) for _ in range(10)]
        assert set(statuses) == {429}
        assert len(database.stored()) == 20


def address_of(url: str) -> tuple[str, int]:
    parts = httpx.URL(url)
    return parts.host, parts.port or 0


async def until_live(url: str) -> None:
    """Ask until it answers: who goes is seen by a worker when it comes round to it."""
    async with asyncio.timeout(20):
        while True:
            if (await get(f"{url}/health/live")).status_code == 200:
                return
            await asyncio.sleep(0.01)


async def publish(url: str, count: int) -> int:
    async with httpx.AsyncClient(timeout=20, verify=False) as client:
        answer = await client.post(
            f"{url}/labels",
            content=json.dumps({"labels": [LABEL] * count}),
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        return answer.status_code


async def test_killed_supervisor_leaves_no_worker_and_the_port_free(
    database: TestDatabase,
) -> None:
    with two_workers("--dsn", database.dsn) as server:
        url = await url_of(server)
        async with streams(url, 6) as readers:
            # Returns when nobody has its output open any more: neither of the workers.
            assert await asyncio.to_thread(server.end, signal.SIGKILL) == -signal.SIGKILL
            for reader in readers:
                await reader.until_closed()
                assert reader.news[-1][1]["error"] == "ServerStopping"
    for pid in pids(server).values():
        await until(lambda pid=pid: not is_alive(pid))
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address_of(url))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def test_stuck_worker_keeps_no_client_waiting_and_is_killed_in_the_end(
    database: TestDatabase,
) -> None:
    with two_workers("--dsn", database.dsn, "--drain-seconds=0.1") as server:
        url = await url_of(server)
        stuck = pids(server)[2]
        os.kill(stuck, signal.SIGSTOP)
        async with streams(url, 8):
            assert await streams_by_worker(server, 8) == {"worker-1": 8}
        assert await asyncio.to_thread(server.end, signal.SIGINT) == 0
    assert f"a worker is killed, it does not end: pid={stuck}" in server.errors
    assert "Traceback" not in server.errors


async def test_all_told_at_once_drain_once(database: TestDatabase) -> None:
    """What systemd does: SIGTERM to every process of the service."""
    with two_workers("--dsn", database.dsn) as server:
        url = await url_of(server)
        async with streams(url, 6) as readers:
            for pid in (server.process.pid, *pids(server).values()):
                os.kill(pid, signal.SIGTERM)
            for reader in readers:
                await reader.until_closed()
                assert reader.news[-1][1]["error"] == "ServerStopping"
            assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.errors
    assert "killed" not in server.errors


async def test_broken_promise_in_a_worker_ends_all(database: TestDatabase) -> None:
    database.fill(20)
    with two_workers("--dsn", database.dsn) as server:
        url = await url_of(server)
        async with streams(url, 6, cursor=0) as readers:
            for reader in readers:
                await reader.until_events(20)
            # As after a restore from a backup that is older than what was streamed.
            database.execute("UPDATE label_stream SET floor = 1000")
            database.execute("DELETE FROM label")
            database.execute("SELECT setval(pg_get_serial_sequence('label', 'id'), 5)")
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'sse-labels'"
            )
            assert await asyncio.to_thread(server.wait) == 1
            for reader in readers:
                await reader.until_closed()
                assert reader.news[-1][0] == "error"
    assert server.err[-1].startswith(
        "sse-labels: the database went back or was rebuilt: its newest seq is 5 in epoch "
    )
    assert "takes its place" not in server.errors
    assert "Traceback" not in server.errors


async def test_worker_that_cannot_start_again_leaves_the_others_serving(
    database: TestDatabase, tmp_path: Path
) -> None:
    """A file that went bad stays in use as it was: by those who have read it."""
    tokens = tmp_path / "tokens"
    tokens.touch()
    with two_workers("--dsn", database.dsn, f"--publish-tokens-file={tokens}") as server:
        url = await url_of(server)
        async with streams(url, 8) as readers:
            tokens.write_text("alice\n")
            os.kill(pids(server)[1], signal.SIGKILL)
            how = "worker=1 how=--publish-tokens-file: got "
            await asyncio.to_thread(server.wait_for, how)
            database.fill(1)
            lived = 0
            for reader in readers:
                with contextlib.suppress(httpx.RemoteProtocolError):
                    lived += len(await reader.until_events(1))
            assert lived == (await streams_by_worker(server, 8))["worker-2"] > 0
            # Again and again, until somebody mends it.
            tokens.write_text("")
            await until_workers_serve(server, {"worker-1": 2, "worker-2": 1})
            # Nobody serves any more: there is nothing to spare.
            tokens.write_text("alice\n")
            for pid in pids(server).values():
                os.kill(pid, signal.SIGKILL)
            assert await asyncio.to_thread(server.wait) == 2
    assert server.errors.count("sse-labels: ") == 1
    assert failure(server)[1].startswith("sse-labels: --publish-tokens-file: got ")


async def until_workers_serve(server: Program, times: dict[str, int]) -> None:
    """Wait until each has begun to serve as often as that."""

    def served() -> Counter[str]:
        return Counter(re.findall(r" (worker-\d) sse_labels.app: serving: ", server.errors))

    await asyncio.to_thread(server.wait_until, lambda: served() == times, f"serving {times}")


def test_worker_that_never_starts_ends_the_server(database: TestDatabase, tmp_path: Path) -> None:
    """As from a broken installation: nothing would change by trying for ever."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'sse_labels.cli.worker' in sys.orig_argv: os._exit(7)\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    ended = ran("serve", "--port=0", "--workers=2", "--dsn", database.dsn, env=env)
    assert ended.process.returncode == 1
    assert ended.err[-1] in (
        "sse-labels: worker 1 did not start: exit status 7",
        "sse-labels: worker 2 did not start: exit status 7",
    )


async def test_told_to_stop_nobody_waits_for_a_worker_that_starts(database: TestDatabase) -> None:
    # The database does not answer it: it has nothing to drain, and is not to be killed.
    with two_workers("--dsn", database.dsn, "--drain-seconds=60") as server:
        await url_of(server)
        holder = database.connect(autocommit=False)
        holder.cursor().execute("LOCK TABLE label_stream IN ACCESS EXCLUSIVE MODE")
        os.kill(pids(server)[1], signal.SIGKILL)
        await until(
            lambda: database.execute(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation ="
                " 'label_stream'::regclass AND pid <> pg_backend_pid()"
            )[0][0] > 0
        )  # fmt: skip
        assert await asyncio.to_thread(server.end) == 0
    assert "Traceback" not in server.errors
    assert "killed" not in server.errors


async def test_workers_serve_without_a_standard_error(database: TestDatabase) -> None:
    port = free_port()
    call = [*command(), "serve", f"--port={port}", "--workers=2", "--dsn", database.dsn]
    server = await asyncio.create_subprocess_exec(
        "sh", "-c", 'exec "$@" 2>&-', "sh", *call, env=environment()
    )
    try:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    if (await get(f"http://127.0.0.1:{port}/health/live")).status_code == 200:
                        break
                await asyncio.sleep(0.02)
    finally:
        server.terminate()
        assert await server.wait() == 0


def test_what_is_wrong_for_one_process_is_said_once_by_two(empty_database: TestDatabase) -> None:
    refused = ran(
        "serve", "--port=0", "--workers=2", "--no-migrate", "--dsn", empty_database.dsn
    )  # fmt: skip
    assert failure(refused)[0] == 2
    assert len(refused.err) == 2
    assert refused.err[0].startswith("publishing is off")


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """One data directory for all tests here: making it takes most of a server's first start."""
    with reachable_directory() as directory:
        with EmbeddedPostgres(directory / "data"):
            pass
        yield directory / "data"


async def test_embedded_database_is_the_supervisors_alone(data_dir: Path) -> None:
    with two_workers("--data-dir", str(data_dir)) as server:
        url = await url_of(server)
        assert [await publish(url, 1) for _ in range(4)] == [201] * 4
        assert postgres_runs_in(data_dir)
        assert await asyncio.to_thread(server.end, signal.SIGHUP) == 0
    assert "Traceback" not in server.errors
    assert not postgres_runs_in(data_dir)


@pytest.mark.parametrize(("workers", "least"), [(1, 0), (64, 64 * (11 + 1))])
def test_embedded_database_has_room_for_all_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int, least: int
) -> None:
    class Made(Exception):
        """Enough is known."""

    def made(data_dir: Path, *, settings: dict[str, str]) -> None:
        # Its own default is for one process.
        assert int(settings.get("max_connections", 0)) >= least
        assert bool(settings) == bool(least)
        raise Made

    monkeypatch.setattr("sse_labels.cli.place.EmbeddedPostgres", made)
    with pytest.raises(Made), database_of(Settings(workers=workers, data_dir=tmp_path)):
        pass


async def test_embedded_database_of_a_killed_server_is_joined_by_the_next(data_dir: Path) -> None:
    with two_workers("--data-dir", str(data_dir)) as server:
        await url_of(server)
        assert await asyncio.to_thread(server.end, signal.SIGKILL) == -signal.SIGKILL
    # As with a single process: at most PostgreSQL is left, and no claim to it.
    with two_workers("--data-dir", str(data_dir)) as server:
        await url_of(server)
        assert await asyncio.to_thread(server.end) == 0
    assert not postgres_runs_in(data_dir)


async def test_any_worker_lists_and_cuts_the_streams_of_all(
    database: TestDatabase, tmp_path: Path
) -> None:
    admin = add_token(tmp_path / "tokens", "olga", ["admin"])
    bearer = {"Authorization": f"Bearer {admin}"}
    tokens = f"--publish-tokens-file={tmp_path / 'tokens'}"
    with two_workers("--dsn", database.dsn, tokens) as server:
        url = await url_of(server)
        async with streams(url, 8) as readers:
            for reader in readers:
                await reader.until_opened()
            listed = (await get(f"{url}/streams", **bearer)).json()
            assert (listed["total"], listed["silent_workers"]) == (8, [])
            assert {row["worker"] for row in listed["streams"]} == {1, 2}
            async with httpx.AsyncClient(verify=False) as client:
                for row in listed["streams"]:
                    cut = await client.delete(f"{url}/streams/{row['id']}", headers=bearer)
                    assert cut.status_code == 204
            for reader in readers:
                await reader.until_closed()
                assert reader.news[-1][1]["error"] == "StreamCut"
            os.kill(pids(server)[2], signal.SIGSTOP)
            try:
                listed = (await get(f"{url}/streams", **bearer)).json()
                assert listed["silent_workers"] == [2]
            finally:
                os.kill(pids(server)[2], signal.SIGCONT)


async def test_worker_that_dies_while_it_is_asked_is_named_and_its_successor_answers(
    database: TestDatabase, tmp_path: Path
) -> None:
    admin = add_token(tmp_path / "tokens", "olga", ["admin"])
    bearer = {"Authorization": f"Bearer {admin}"}
    tokens = f"--publish-tokens-file={tmp_path / 'tokens'}"
    with two_workers("--dsn", database.dsn, tokens) as server:
        url = await url_of(server)
        async with streams(url, 6):
            before = (await get(f"{url}/streams", **bearer)).json()
            dying = pids(server)[2]
            os.kill(dying, signal.SIGSTOP)
            asking = asyncio.create_task(get(f"{url}/streams", **bearer))
            # Connected, and as long as it is stopped never answered.
            await until(lambda: questions_that_wait_for(dying) == 1)
            os.kill(dying, signal.SIGKILL)
            listed = (await asking).json()
            assert listed["silent_workers"] == [2]
            assert listed["total"] == sum(row["worker"] == 1 for row in before["streams"])
            await until_workers_serve(server, {"worker-1": 1, "worker-2": 2})
            async with streams(url, 6):
                after = (await get(f"{url}/streams", **bearer)).json()
    assert after["silent_workers"] == []
    assert {row["worker"] for row in after["streams"]} == {1, 2}
    # An id in the log names one stream, whichever worker had it, and over restarts.
    opened = re.findall(r"stream opened: .* id=(\w+)$", server.errors, re.MULTILINE)
    assert len(set(opened)) == len(opened) == 12


def questions_that_wait_for(pid: int) -> int:
    """How many have connected to where a worker listens for its neighbours (proc(5), net/unix)."""
    own = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}
    sockets = re.findall(r"(\d+) (@sse-labels-\S+)$", Path("/proc/net/unix").read_text(), re.M)
    [door] = {name for inode, name in sockets if f"socket:[{inode}]" in own}
    return sum(name == door for _, name in sockets) - 1


async def test_a_wrong_signature_is_flagged_by_one_of_the_workers(
    database: TestDatabase, tmp_path: Path
) -> None:
    source = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
    keys = tmp_path / "keys"
    keys.write_text(f"{source} {SigningKey(bytes([31]) * 32).did_key}\n")
    with two_workers("--dsn", database.dsn, "--source-keys-file", str(keys)) as server:
        url = await url_of(server)
        # What is there before a worker follows is history to it, and not looked at.
        for worker in (1, 2):
            await asyncio.to_thread(server.wait_for, rf"worker-{worker} .*: following: head=0")
        database.insert(1, src=source, sig=bytes(64))
        await asyncio.to_thread(server.wait_for, "signature is wrong: seq=1")
        # Both have read it by now: each streams it.
        async with reading(f"{url}/stream", cursor=0) as one, reading(f"{url}/stream") as two:
            await one.until_seq(1)
            database.insert(1)
            await asyncio.gather(one.until_seq(2), two.until_seq(2))
        server.end()
    assert server.errors.count("signature is wrong") == 1
