"""What leaves the edge to PostgreSQL: rows, an error of ours, or a genuine cancellation."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
from psycopg2.errors import QueryCanceled
from psycopg2.extensions import make_dsn, parse_dsn

from sse_labels.database.pool import Database
from sse_labels.errors import ConfigError, DatabaseRefused, DatabaseUnavailable

from support.database import TestDatabase, until
from support.reading import PATIENCE_SECONDS

#: Waits while the table is locked.
READ = "SELECT id FROM label ORDER BY id"


@contextmanager
def opened(dsn: str, **settings: Any) -> Iterator[Database]:
    defaults = {
        "connect_timeout_seconds": PATIENCE_SECONDS,
        "query_timeout_seconds": PATIENCE_SECONDS,
        "max_connections": 3,
    }
    edge = Database(dsn, **{**defaults, **settings})
    try:
        yield edge
    finally:
        edge.close()


async def read(edge: Database) -> list[tuple[Any, ...]]:
    async with edge.borrow() as connection:
        return await connection.execute(READ)


@contextmanager
def locked(database: TestDatabase) -> Iterator[None]:
    """Nobody can read the labels inside the block."""
    session = database.connect(autocommit=False)
    session.cursor().execute("LOCK TABLE label IN ACCESS EXCLUSIVE MODE")
    try:
        yield
    finally:
        session.rollback()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and which nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def hosts(database: TestDatabase, *ports: int) -> str:
    """A DSN that names 127.0.0.1 with each of `ports`, and then where the database really is."""
    real = parse_dsn(database.dsn)
    return make_dsn(
        database.dsn,
        host=",".join(["127.0.0.1"] * len(ports) + [real["host"]]),
        port=",".join([*map(str, ports), real["port"]]),
    )


class TestTimeouts:
    async def test_statement_timeout_is_translated(self, database: TestDatabase) -> None:
        with locked(database), opened(database.dsn) as edge:
            database.execute(f"ALTER DATABASE {database.name} SET statement_timeout = '100ms'")
            # As the sequencer runs: a TaskGroup takes a CancelledError for the end of the task.
            with pytest.raises(BaseExceptionGroup) as caught:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(read(edge))
            [error] = caught.value.exceptions
            assert isinstance(error, DatabaseUnavailable)
            assert isinstance(error.__cause__, QueryCanceled)

    async def test_statement_timeout_closes_its_connection(self, database: TestDatabase) -> None:
        with opened(database.dsn) as edge:
            with locked(database):
                database.execute(f"ALTER DATABASE {database.name} SET statement_timeout = '100ms'")
                connection = await edge.connect()
                with pytest.raises(DatabaseUnavailable):
                    await connection.execute(READ)
                assert connection.closed
            database.execute(f"ALTER DATABASE {database.name} RESET statement_timeout")
            assert await read(edge) == []

    async def test_query_timeout_closes_its_connection(self, database: TestDatabase) -> None:
        with opened(database.dsn, query_timeout_seconds=0.1) as edge:
            connection = await edge.connect()
            with locked(database), pytest.raises(DatabaseUnavailable, match=r"0\.1 s") as caught:
                await connection.execute(READ)
            assert isinstance(caught.value.__cause__, TimeoutError)
            assert connection.closed
            assert await read(edge) == []

    async def test_query_timeout_of_one_statement_wins_over_the_default(
        self, database: TestDatabase
    ) -> None:
        with opened(database.dsn) as edge:
            connection = await edge.connect()
            with locked(database), pytest.raises(DatabaseUnavailable, match=r"0\.05 s"):
                await connection.execute(READ, timeout_seconds=0.05)

    async def test_cancellation_passes_through(self, database: TestDatabase) -> None:
        with opened(database.dsn, max_connections=1) as edge:
            with locked(database):
                asking = asyncio.create_task(read(edge))
                await until(database.waiting_for_locks)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            # Its slot of the pool is free again, and its connection was not put back.
            assert await read(edge) == []

    async def test_cancellation_that_comes_together_with_the_answer_is_not_lost(
        self, database: TestDatabase
    ) -> None:
        lost = []
        with opened(database.dsn) as edge:
            for turns in range(6):
                asking = asyncio.create_task(read(edge))
                with locked(database):
                    await until(database.waiting_for_locks)
                    asked = database.backends("SELECT id FROM label")
                # The answer lies ready, and the loop takes it in some turns: cancelled in each.
                stand_still_until_answered(database, asked)
                lost += await cancelled_after(turns, asking)
        assert lost == []

    async def test_cancellation_that_comes_together_with_a_failure_is_not_lost(
        self, database: TestDatabase
    ) -> None:
        lost = []
        with opened(database.dsn) as edge:
            for turns in range(6):
                with locked(database):
                    asking = asyncio.create_task(read(edge))
                    await until(database.waiting_for_locks)
                    database.terminate(database.backends())
                    lost += await cancelled_after(turns, asking)
        assert lost == []

    async def test_cancellation_while_waiting_for_the_pool_takes_no_slot(
        self, database: TestDatabase
    ) -> None:
        with opened(database.dsn, max_connections=1) as edge:
            async with edge.borrow():
                asking = asyncio.create_task(edge.fetch("ping"))
                await asyncio.sleep(0)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            assert await edge.fetch("ping") == [(1,)]


async def cancelled_after(turns: int, asking: asyncio.Task[Any]) -> list[int]:
    """Cancel a task after some turns of the event loop; return `[turns]` when it ignored that."""
    for _ in range(turns):
        await asyncio.sleep(0)
    was_cancelled = asking.cancel()
    await asyncio.wait({asking})
    return [turns] if was_cancelled and not asking.cancelled() else []


def stand_still_until_answered(database: TestDatabase, pids: list[int]) -> None:
    """Return when these sessions have answered, without a turn of the event loop."""
    while database.execute(
        "SELECT FROM pg_stat_activity WHERE pid = ANY (%s) AND state <> 'idle'", (pids,)
    ):
        pass


class TestErrors:
    async def test_a_refused_statement_leaves_the_connection_usable(
        self, database: TestDatabase
    ) -> None:
        with opened(database.dsn) as edge, pytest.raises(DatabaseRefused) as caught:
            connection = await edge.connect()
            try:
                await connection.execute("SELECT * FROM nothing_of_that_name")
            finally:
                assert await connection.fetch("ping") == [(1,)]
                connection.close()
        assert isinstance(caught.value.__cause__, psycopg2.ProgrammingError)

    @pytest.mark.parametrize(
        ("state", "wanted"),
        [
            *((state, "away") for state in (
                "08006", "25006", "25P03", "25P04", "40001", "40P01", "53100", "53200", "53300",
                "55000", "55006", "55P03", "57014", "57P01", "57P03", "58030", "72000", "XX000",
            )),
            *((state, "refused") for state in (
                "0A000", "25001", "28000", "2BP01", "34000", "3D000", "3F000", "42501", "42601",
                "42703", "42883", "42P01",
            )),
            *((state, "values") for state in (
                "21000", "22001", "22003", "22021", "22P05", "2200H", "23502", "23505", "23514",
                "23P01", "44000", "54000", "P0001", "P0004", "38001", "39P01", "LB001", "99999",
            )),
        ],
    )  # fmt: skip
    async def test_a_code_says_whether_trying_again_helps(
        self, database: TestDatabase, state: str, wanted: str
    ) -> None:
        with opened(database.dsn) as edge:
            connection = await edge.connect()
            with pytest.raises((DatabaseUnavailable, DatabaseRefused)) as caught:
                await connection.execute(
                    f"DO $$ BEGIN RAISE 'not %', 'now' USING ERRCODE = '{state}'; END $$"
                )
            error = caught.value
            if isinstance(error, DatabaseRefused):
                found = "values" if error.of_values else "refused"
                # Nothing is wrong with the connection.
                assert await connection.fetch("ping") == [(1,)]
            else:
                found = "away"
                assert connection.closed
            connection.close()
        assert (found, "not now" in str(error)) == (wanted, True)
        assert isinstance(error.__cause__, psycopg2.Error)

    async def test_a_refusal_is_told_with_its_hint_in_one_line(
        self, database: TestDatabase
    ) -> None:
        with opened(database.dsn) as edge:
            connection = await edge.connect()
            with pytest.raises(DatabaseRefused) as caught:
                await connection.execute(
                    "DO $$ BEGIN RAISE E'one\ntwo' USING HINT = 'Three.'; END $$"
                )
            connection.close()
        assert str(caught.value) == "the database refuses: one two (Three.)"

    async def test_a_lost_connection_is_translated(self, database: TestDatabase) -> None:
        with opened(database.dsn) as edge:
            connection = await edge.connect()
            with locked(database):
                asking = asyncio.create_task(connection.execute(READ))
                await until(database.waiting_for_locks)
                database.terminate(database.backends())
                with pytest.raises(DatabaseUnavailable) as caught:
                    await asking
            assert isinstance(caught.value.__cause__, psycopg2.Error)
            assert connection.closed

    async def test_every_session_is_read_committed(self, database: TestDatabase) -> None:
        database.execute(
            f"ALTER DATABASE {database.name} SET default_transaction_isolation = 'serializable'"
        )
        with opened(database.dsn) as edge:
            async with edge.borrow() as connection:
                shown = await connection.execute("SHOW transaction_isolation")
                assert shown == [("read committed",)]

    async def test_options_of_the_dsn_hold_too(self, database: TestDatabase) -> None:
        with opened(make_dsn(database.dsn, options="-c work_mem=1234kB")) as edge:
            async with edge.borrow() as connection:
                assert await connection.execute("SHOW work_mem") == [("1234kB",)]
                shown = await connection.execute("SHOW transaction_isolation")
                assert shown == [("read committed",)]


class TestAddresses:
    async def test_the_second_host_answers_when_the_first_refuses(
        self, database: TestDatabase, closed_port: int
    ) -> None:
        with opened(hosts(database, closed_port)) as edge:
            assert await edge.fetch("ping") == [(1,)]

    async def test_the_second_host_answers_when_the_first_is_silent(
        self, database: TestDatabase, silent_port: int
    ) -> None:
        with opened(hosts(database, silent_port), connect_timeout_seconds=0.2) as edge:
            assert await edge.fetch("ping") == [(1,)]

    async def test_the_second_host_answers_when_the_first_does_not_resolve(
        self, database: TestDatabase
    ) -> None:
        real = parse_dsn(database.dsn)
        dsn = make_dsn(database.dsn, host=f"nowhere.invalid,{real['host']}")
        with opened(dsn) as edge:
            assert await edge.fetch("ping") == [(1,)]

    async def test_a_closed_port_is_unavailable(self, closed_port: int) -> None:
        with (
            opened(f"host=127.0.0.1 port={closed_port} dbname=x") as edge,
            pytest.raises(DatabaseUnavailable, match="cannot connect") as caught,
        ):
            await edge.connect()
        assert isinstance(caught.value.__cause__, psycopg2.OperationalError)

    async def test_every_address_that_failed_is_named(
        self, closed_port: int, silent_port: int
    ) -> None:
        dsn = f"host=127.0.0.1,127.0.0.1 port={closed_port},{silent_port} dbname=x"
        with (
            opened(dsn, connect_timeout_seconds=0.2) as edge,
            pytest.raises(DatabaseUnavailable) as caught,
        ):
            await edge.connect()
        assert "refused" in str(caught.value)
        assert "no answer in 0.2 s" in str(caught.value)

    async def test_a_host_that_accepts_and_says_nothing_is_given_up(self, silent_port: int) -> None:
        with (
            opened(
                f"host=127.0.0.1 port={silent_port} dbname=x", connect_timeout_seconds=0.2
            ) as edge,
            pytest.raises(DatabaseUnavailable, match=r"no answer in 0\.2 s") as caught,
        ):
            await edge.connect()
        assert isinstance(caught.value.__cause__, TimeoutError)

    async def test_a_host_that_does_not_resolve_is_unavailable(self) -> None:
        with (
            opened("host=nowhere.invalid dbname=x") as edge,
            pytest.raises(DatabaseUnavailable, match=r"nowhere\.invalid"),
        ):
            await edge.connect()

    async def test_several_numeric_addresses_are_tried_one_by_one(
        self, database: TestDatabase, closed_port: int, silent_port: int
    ) -> None:
        dsn = (
            "host=first.invalid,second.invalid hostaddr=127.0.0.1,127.0.0.1"
            f" port={closed_port},{silent_port} dbname=x"
        )
        with (
            opened(dsn, connect_timeout_seconds=0.2) as edge,
            pytest.raises(DatabaseUnavailable) as caught,
        ):
            await edge.connect()
        assert "refused" in str(caught.value)
        assert "no answer in 0.2 s" in str(caught.value)

    async def test_ports_must_match_the_hosts(self) -> None:
        with (
            opened("host=a.invalid,b.invalid,c.invalid port=1,2 dbname=x") as edge,
            pytest.raises(ConfigError, match="3"),
        ):
            await edge.connect()


#: libpq's own message quotes the part of the DSN that it could not read.
@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://label:hunter2%zz@db.example/labels",
        "postgresql://label:hunter2@[::1/labels",
        "host=db.example password='hunter2",
        "host=db.example password hunter2",
        "host=db.example hunter2",
        "postgresql://db.example/labels?hunter2",
        "hunter2",
    ],
)
def test_a_malformed_dsn_is_refused_and_not_shown(dsn: str) -> None:
    with pytest.raises(ConfigError, match="--dsn") as caught, opened(dsn):
        pass
    assert "hunter2" not in str(caught.value)


class TestPool:
    async def test_the_pool_never_exceeds_its_bound(self, database: TestDatabase) -> None:
        with opened(database.dsn, max_connections=3) as edge:
            with locked(database):
                asking = [asyncio.create_task(read(edge)) for _ in range(10)]
                await until(lambda: database.waiting_for_locks() == 3)
                assert len(database.backends()) == 3
            assert await asyncio.gather(*asking) == [[]] * 10
            assert len(database.backends()) == 3

    async def test_the_pool_uses_a_connection_again(self, database: TestDatabase) -> None:
        with opened(database.dsn) as edge:
            await edge.fetch("ping")
            first = database.backends()
            for _ in range(5):
                await edge.fetch("ping")
            assert database.backends() == first

    async def test_the_pool_replaces_killed_connections(self, database: TestDatabase) -> None:
        with opened(database.dsn, max_connections=3) as edge:
            with locked(database):
                asking = [asyncio.create_task(read(edge)) for _ in range(3)]
                await until(lambda: database.waiting_for_locks() == 3)
            await asyncio.gather(*asking)
            killed = database.backends()
            assert len(killed) == 3
            database.terminate(killed)
            # A turn of the event loop, in which it sees that they are gone: what is ready to be
            # read is found at the end of a turn and looked at in the next one.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert await asyncio.gather(*(edge.fetch("ping") for _ in range(3))) == [[(1,)]] * 3
            assert not set(database.backends()) & set(killed)

    async def test_a_closed_pool_keeps_no_session(self, database: TestDatabase) -> None:
        with opened(database.dsn) as edge:
            await edge.fetch("ping")
            async with edge.borrow():
                edge.close()
            await until(lambda: not database.backends())
