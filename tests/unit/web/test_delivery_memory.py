"""What a delivery holds while its consumer waits for live events."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from sse_labels.config import Settings
from sse_labels.feed.chunk import Chunk, encode_rows
from sse_labels.feed.steps import Events
from sse_labels.metrics import Metrics
from sse_labels.protocol.label import Row
from sse_labels.web.delivery import Delivery
from sse_labels.web.event_stream import CHUNKED


class OneStep:
    """An outbox that yields one chunk, and then waits: what follows goes express."""

    closed = None
    position = 1

    def __init__(self, chunk: Chunk) -> None:
        self.chunks = [chunk]
        self.waits = asyncio.Event()

    def events(self, cursor: int) -> OneStep:
        return self

    def __aiter__(self) -> OneStep:
        return self

    async def __anext__(self) -> Events:
        if self.chunks:
            return Events([self.chunks.pop()])
        self.waits.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def aclose(self) -> None:
        """Nothing to free."""


class Taken:
    """A transport whose kernel takes all; and the answer, which says nothing."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int) -> None:
        """Backpressure is not wanted here."""

    async def begin(self) -> int:
        return 0

    def force_close(self) -> None:
        """No other request comes."""


async def test_a_chunk_that_was_written_is_let_go_while_events_go_express() -> None:
    row = Row(1, "did:plc:a", "at://b/1", "", "spam", None, "t", None, None)
    chunk = encode_rows([row], start=0, end=1)
    wire, outbox = chunk.wire, OneStep(chunk)
    del chunk
    transport: Any = Taken()
    some: Any = outbox
    delivery = Delivery(
        transport, some, CHUNKED, Metrics(), Settings(), start=0, ended=lambda how: None
    )
    running = asyncio.create_task(delivery.run(transport))
    await outbox.waits.wait()
    gc.collect()
    assert transport.written == wire
    assert not [one for one in gc.get_objects() if isinstance(one, Chunk) and one.wire == wire]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
