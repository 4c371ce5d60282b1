"""A cache or queue holds the memory that it counts, as `tracemalloc` sees it, and little more."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sse_labels.feed.chunk import Chunk, encode_rows, kept_nbytes
from sse_labels.feed.outbox import Outbox
from sse_labels.feed.pages import Pages
from sse_labels.feed.ring import PAGES_SHARE, Ring
from sse_labels.feed.sequencer import Sequencer
from sse_labels.feed.steps import CaughtUp
from sse_labels.feed.store import PageRows
from sse_labels.metrics import Metrics
from sse_labels.protocol.filters import Filter
from sse_labels.protocol.label import Row
from sse_labels.web.label_socket import Messages

#: What the caches are allowed here, in bytes.
BOUND = 2**18
#: What is held may be more than what is counted: by this factor, for lists that have room to grow,
FACTOR = 1.25
#: and by so much for what is there once: dicts, deques, and the interpreter's own caches.
ONCE = 32 * 1024

#: By what is hidden: nothing, 99 of 100, all.
VALUES = ("", "rare", "nobody")


def make_row(seq: int, src: str = "did:plc:ewvi7nxzyoun6zhxrhs64oiz") -> Row:
    """A row as the driver makes one: no string is shared with another row."""
    uri = f"at://did:plc:{seq:024}/app.bsky.feed.post/3jwdwj2ctlk26"
    val = str(b"rare" if seq % 100 == 0 else b"spam", "ascii")
    return Row(
        seq, str(src.encode(), "ascii"), uri, "", val, None, "2026-01-01T00:00:00Z", None, None
    )


def make_chunk(start: int, events: int, *, with_keys: bool = True) -> Chunk:
    end = start + events
    rows = [make_row(seq) for seq in range(start + 1, end + 1)]
    return encode_rows(rows, start=start, end=end, with_keys=with_keys)


def make_filter(value: str, number: int) -> Filter | None:
    """Each number is another filter, which hides the same."""
    return Filter(values=frozenset({value, f"unused-{number}"})) if value else None


def fill(ring: Ring, chunks: int, events: int) -> None:
    for _ in range(chunks):
        ring.append(make_chunk(ring.end, events))


@pytest.fixture
def held() -> Iterator[Callable[[], int]]:
    """How many bytes have been allocated in this test and not been freed."""
    # What is made once per process is not what a cache holds.
    make_chunk(0, 1).select(make_filter("rare", 0))
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: (gc.collect(), tracemalloc.get_traced_memory()[0])[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("chunks", "events"), [(1500, 1), (15, 100), (3, 1000)])
def test_ring_at_its_bound(held: Callable[[], int], chunks: int, events: int) -> None:
    ring = Ring(0, BOUND)
    fill(ring, chunks, events)
    assert ring.nbytes <= BOUND or len(ring) == 1
    assert ring.nbytes >= BOUND / 2
    assert held() <= FACTOR * ring.nbytes + ONCE


def test_ring_of_labels_that_share_nothing(held: Callable[[], int]) -> None:
    ring = Ring(0, BOUND)
    while ring.start == 0:
        start = ring.end
        rows = [make_row(seq, f"did:plc:{seq:x>1000}") for seq in range(start + 1, start + 101)]
        ring.append(encode_rows(rows, start=start, end=start + 100, with_keys=True))
    del rows
    assert held() <= FACTOR * ring.nbytes + ONCE


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("events", [1, 100, 500])
def test_pages_of_a_ring_at_their_bound(held: Callable[[], int], value: str, events: int) -> None:
    ring = Ring(0, 2 * BOUND)
    fill(ring, 700 // events, events)
    for number in range(60):
        ring.page(ring.start + number, 50, make_filter(value, number))
    counted = ring._pages_nbytes
    assert BOUND / PAGES_SHARE <= counted <= 2 * BOUND / PAGES_SHARE
    assert counted == sum(kept_nbytes(page, key[2]) for key, page in ring._pages.items())
    # When all that they were cut out of has left.
    fill(ring, 1000 // events, events)
    assert held() <= FACTOR * (counted + ring.nbytes) + ONCE


class Table:
    """A store of endless history, a page of 100 rows at a time."""

    async def page(self, cursor: int, head: int, limit: int) -> PageRows:
        rows = [
            make_row(seq)._replace(sig=memoryview(bytes(64)))
            for seq in range(cursor + 1, cursor + limit + 1)
        ]
        return PageRows(rows, cursor, cursor + limit, True, 1)


@pytest.mark.parametrize("value", VALUES)
def test_page_cache_at_its_bound(held: Callable[[], int], value: str) -> None:
    store: Any = Table()
    pages = Pages(
        store, lambda: 2**40, Metrics(), page_max_events=100, max_reads=1, cache_max_bytes=4 * BOUND
    )

    async def read() -> None:
        for number in range(60):
            await pages.read("somebody", 700 * number, make_filter(value, number))
            await pages.read("somebody", 350 * number, None)

    asyncio.run(read())
    assert 3 * BOUND <= pages._cache_bytes <= 4 * BOUND
    assert pages._cache_bytes == sum(nbytes for _, nbytes in pages._cache.values())
    assert held() <= FACTOR * pages._cache_bytes + ONCE


@pytest.mark.parametrize("value", VALUES)
def test_slices_whose_chunk_has_left(held: Callable[[], int], value: str) -> None:
    chunk = make_chunk(0, 2000)
    filter = make_filter(value, 0)
    parts = [chunk.after(1998), chunk.after(900, 20), chunk.after(500, 200).select(filter)]
    parts += [part.after(part.start + 1) for part in parts]
    del chunk
    assert held() <= FACTOR * sum(part.nbytes for part in parts) + ONCE


async def lagging_outbox(sequencer: Sequencer, filter: Filter | None, max_events: int) -> Outbox:
    """An outbox of a consumer that is live, and does not read."""
    pages: Any = None
    outbox = Outbox(
        sequencer, pages, Metrics(), client="somebody", filter=filter, page_max_events=500,
        max_events=max_events, heartbeat_seconds=15,
    )  # fmt: skip
    steps = outbox.events(sequencer.head)
    while not isinstance(await anext(steps), CaughtUp):
        pass
    return outbox


@pytest.mark.parametrize("value", VALUES)
async def test_queue_of_a_lagging_outbox_at_its_bound(held: Callable[[], int], value: str) -> None:
    store: Any = None
    sequencer = Sequencer(
        store, Metrics(), page_max_events=500, ring_max_bytes=BOUND, poll_seconds=1,
        gather_seconds=0,
    )  # fmt: skip
    outbox = await lagging_outbox(sequencer, make_filter(value, 0), max_events=61)
    # Something waits, whatever the filter hides.
    first = make_chunk(0, 1)
    outbox.push(first)
    sequencer.publish(first)
    del first
    # Of these 60 are seen, or 1 in 100, or none.
    for _ in range(1 if not value else 60):
        sequencer.publish(make_chunk(sequencer.head, 100))
    assert outbox.closed is None
    assert outbox._queue is not None
    counted = sum(chunk.nbytes for chunk in outbox._queue._queue)
    assert held() <= FACTOR * (counted + sequencer.ring.nbytes) + ONCE
    await outbox.aclose()
    del outbox
    assert held() <= FACTOR * sequencer.ring.nbytes + ONCE


async def test_what_a_filter_hides_takes_no_memory_behind_an_event_that_waits(
    held: Callable[[], int],
) -> None:
    store: Any = None
    sequencer = Sequencer(
        store, Metrics(), page_max_events=500, ring_max_bytes=1, poll_seconds=1, gather_seconds=0
    )
    filter = Filter(values=frozenset({"rare"}))
    outbox = await lagging_outbox(sequencer, filter, max_events=10)
    sequencer.publish(make_chunk(0, 100))
    before = held()
    for _ in range(1000):
        start = sequencer.head
        sequencer.publish(encode_rows([make_row(101)], start=start, end=start + 1, with_keys=True))
    assert outbox.queued == 1
    assert outbox.closed is None
    assert held() <= before + 4096
    [step] = [await anext(outbox)]
    assert [list(chunk.seqs) for chunk in step.chunks] == [[100], []]  # type: ignore[union-attr]
    assert outbox.position == sequencer.head == 1100
    await outbox.aclose()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("max_bytes", [BOUND // 4, 16 * BOUND])
def test_messages_for_sockets_at_their_bound(
    held: Callable[[], int], value: str, max_bytes: int
) -> None:
    ring = Ring(0, 2 * BOUND)
    fill(ring, 10, 100)
    messages = Messages(max_bytes)
    parts = []
    for chunk in ring.after(ring.start):
        # A consumer of everything, one with a filter, and some that come from different places.
        parts += [chunk.select(make_filter(value, 0))]
        parts += [chunk.after(chunk.start + n) for n in range(0, 100, 20)]
    for part in parts:
        if part.seqs:
            messages.events(part)
    assert BOUND / 8 <= messages.nbytes <= max_bytes
    counted = sum(part.nbytes for part in parts) + ring.nbytes
    assert held() <= FACTOR * (counted + messages.nbytes) + ONCE
    # What they are kept by is counted, too: their chunks may be gone.
    del parts, part, chunk
    fill(ring, 20, 100)
    assert held() <= FACTOR * (ring.nbytes + messages.nbytes) + ONCE
