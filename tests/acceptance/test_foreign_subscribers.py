"""`subscribeLabels`, read by clients that nobody here wrote."""

from __future__ import annotations

import asyncio
import threading
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import pytest

from support.database import TestDatabase, until
from support.nginx import nginx
from support.node import NEWEST, PACKAGES, NodeProgram
from support.program import free_port
from support.server import RunServer, Server

with warnings.catch_warnings():
    # The SDK's own modules name its deprecated ones.
    warnings.simplefilter("ignore", DeprecationWarning)
    from atproto import FirehoseSubscribeLabelsClient, models, parse_subscribe_labels_message

SIG = bytes(range(64))


def varied(database: TestDatabase) -> int:
    """Store labels of every form; return the last seq."""
    database.insert(3)
    database.insert(1, cid="bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a", neg=True)
    database.insert(1, exp="2030-01-01T00:00:00Z", sig=SIG)
    database.insert(1, val="spam", neg=True)
    return database.insert(1, val="ü\U0001f98b")[-1]


class PythonSubscriber:
    """The Python SDK's client in a thread of its own: it is not asynchronous."""

    def __init__(self, url: str, cursor: int) -> None:
        self.received: list[Any] = []
        self.failed: list[BaseException] = []
        self._client = FirehoseSubscribeLabelsClient(
            models.ComAtprotoLabelSubscribeLabels.Params(cursor=cursor),
            base_uri=url.replace("http://", "ws://") + "/xrpc",
        )
        # It waits for seconds, and each time twice as long.
        self._client._max_reconnect_delay_sec = 1
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._client.start(self._receive, self.failed.append)
        except BaseException as error:
            self.failed.append(error)

    def _receive(self, frame: Any) -> None:
        message = parse_subscribe_labels_message(frame)
        self.received.append(message)
        # As its documentation says: where to go on is the caller's to keep.
        self._client.update_params({"cursor": message.seq})

    async def __aenter__(self) -> PythonSubscriber:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.stop()
        await asyncio.to_thread(self._thread.join, 20)
        assert not self._thread.is_alive()


def as_event(message: Any) -> dict[str, Any]:
    """What the SDK made of a message, in the form of the stream."""
    labels = []
    for label in message.labels:
        fields = label.model_dump(exclude_none=True, exclude={"py_type"})
        if "sig" in fields:
            fields["sig"] = {"$bytes": b64encode(fields["sig"]).decode().rstrip("=")}
        labels.append(fields)
    return {"seq": message.seq, "labels": labels}


async def test_the_python_sdk_receives_what_is_stored(
    server: Server, database: TestDatabase
) -> None:
    varied(database)
    async with PythonSubscriber(server.url, 0) as client:
        await until(lambda: client.received or client.failed)
        [last] = database.insert()
        await until(lambda: client.failed or client.received[-1].seq == last)
        assert client.failed == []
        assert [as_event(message) for message in client.received] == database.stored()


async def test_the_python_sdk_is_told_of_a_future_cursor(server: Server) -> None:
    async with PythonSubscriber(server.url, 99) as client:
        await until(lambda: client.failed)
        assert "FutureCursor" in repr(client.failed[0])


class NodeSubscriber:
    """The reference implementation's client."""

    def __init__(
        self, url: str, cursor: int, client: str = "subscription", packages: str = NEWEST
    ) -> None:
        self._program = NodeProgram(
            "subscribe.mjs",
            {"URL": url.replace("http://", "ws://"), "CURSOR": str(cursor), "CLIENT": client},
            packages,
        )

    async def next(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._program.next)

    async def __aenter__(self) -> NodeSubscriber:
        self._program.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._program.stop()


@pytest.mark.parametrize("packages", PACKAGES)
async def test_the_reference_subscription_receives_what_is_stored(
    server: Server, database: TestDatabase, packages: str
) -> None:
    last = varied(database)
    async with NodeSubscriber(server.url, 0, packages=packages) as client:
        events = [await client.next() for _ in range(last)]
        database.insert()
        events.append(await client.next())
    for event in events:
        assert event.pop("$type") == "com.atproto.label.subscribeLabels#labels"
    assert events == database.stored()


@contextmanager
def way_to(port: int, way: str) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Where clients reach a server on this port, and whether nginx has missed the server."""
    if way == "direct":
        yield f"http://127.0.0.1:{port}", lambda: True
    else:
        with nginx(port) as proxy:
            yield proxy.url, lambda: "Connection refused" in proxy.errors()


@pytest.mark.parametrize("packages", PACKAGES)
@pytest.mark.parametrize("way", ["direct", "through nginx"])
async def test_the_reference_subscription_comes_back_after_a_restart(
    run_server: RunServer, database: TestDatabase, way: str, packages: str
) -> None:
    database.insert(3)
    port = free_port()
    async with AsyncExitStack() as stack:
        url, missed = stack.enter_context(way_to(port, way))
        async with run_server(port=port):
            client = await stack.enter_async_context(NodeSubscriber(url, 0, packages=packages))
            seqs = [(await client.next())["seq"] for _ in range(3)]
        database.insert(3)
        # It has tried to come back while no server was there.
        await until(missed)
        async with run_server(port=port):
            seqs += [(await client.next())["seq"] for _ in range(3)]
    assert seqs == [event["seq"] for event in database.stored()]


@pytest.mark.parametrize("way", ["direct", "through nginx"])
async def test_the_python_sdk_comes_back_after_a_restart(
    run_server: RunServer, database: TestDatabase, way: str
) -> None:
    database.insert(3)
    port = free_port()
    async with AsyncExitStack() as stack:
        url, missed = stack.enter_context(way_to(port, way))
        async with run_server(port=port):
            client = await stack.enter_async_context(PythonSubscriber(url, 0))
            await until(lambda: client.failed or len(client.received) == 3)
        database.insert(3)
        await until(missed)
        async with run_server(port=port):
            await until(lambda: client.failed or len(client.received) == 6)
    assert client.failed == []
    assert [as_event(message) for message in client.received] == database.stored()


@pytest.mark.parametrize(("cursor", "name"), [(99, "FutureCursor"), (1, "OutdatedCursor")])
async def test_the_reference_frames_read_errors_and_news(
    server: Server, database: TestDatabase, cursor: int, name: str
) -> None:
    database.insert(5)
    database.execute("UPDATE label_stream SET floor = 4")
    database.execute("DELETE FROM label WHERE id < 4")
    async with NodeSubscriber(server.url, cursor, "frames") as client:
        first = await client.next()
        if name == "FutureCursor":
            assert first["header"] == {"op": -1}
            assert first["body"]["error"] == name
            assert await client.next() == {"closed": 1008}
        else:
            assert first["header"] == {"op": 1, "t": "#info"}
            assert first["body"]["name"] == name
            then = [await client.next() for _ in range(2)]
            assert [frame["header"] for frame in then] == [{"op": 1, "t": "#labels"}] * 2
            assert [frame["body"] for frame in then] == database.stored()
