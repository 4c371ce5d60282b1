"""What the store answers, compared with the table: pages, the floor, queries, inserts."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from typing import Any

import psycopg2
import pytest

from sse_labels.database.pool import Database
from sse_labels.database.queries import block
from sse_labels.database.schema import Schema
from sse_labels.errors import DatabaseRefused
from sse_labels.feed.chunk import Chunk, encode_rows
from sse_labels.feed.store import Page, PageRows, Snapshot, Store
from sse_labels.protocol.filters import Filter, parse_filter
from sse_labels.protocol.label import Label, label_json
from sse_labels.protocol.sse import encode_frame
from sse_labels.publishing.label_table import LabelTable

from support.database import TestDatabase, expected_event

ALICE, BOB, CAROL = (f"did:plc:{name}" for name in ("alice", "bob", "carol"))


def edge_to(dsn: str) -> Database:
    return Database(dsn, connect_timeout_seconds=10, query_timeout_seconds=10, max_connections=2)


@pytest.fixture
async def store(database: TestDatabase) -> AsyncIterator[Store]:
    """The store of this test's database."""
    edge = edge_to(database.dsn)
    made = Store(edge, Schema(edge))
    await made.schema.check()
    yield made
    edge.close()


def frames(events: Iterable[dict[str, Any]]) -> bytes:
    """What a chunk of these events holds."""
    return "".join(encode_frame(e["seq"], reordered(e["labels"][0])) for e in events).encode()


def reordered(label: dict[str, Any]) -> dict[str, Any]:
    """The same label with its keys in the order of the wire."""
    order = ["ver", "src", "uri", "cid", "val", "neg", "cts", "exp", "sig"]
    return {key: label[key] for key in order if key in label}


def as_events(rows: Iterable[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [expected_event(*row) for row in rows]


class TestPages:
    async def test_pages_one_after_the_other_are_the_whole_table(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(25)
        pages = await all_pages(store, head=25, limit=10)
        assert [len(page.chunk) for page in pages] == [10, 10, 5]
        assert [page.full for page in pages] == [True, True, False]
        assert [(page.chunk.start, page.chunk.end) for page in pages] == [
            (0, 10),
            (10, 20),
            (20, 25),
        ]
        assert data(pages) == frames(database.stored())

    async def test_a_page_ends_at_the_head(self, store: Store, database: TestDatabase) -> None:
        database.fill(25)
        page = await page_of(store, 5, 12, 10)
        assert list(page.chunk.seqs) == list(range(6, 13))
        assert (page.chunk.end, page.full) == (12, False)
        exact = await page_of(store, 5, 15, 10)
        assert (exact.chunk.end, exact.full) == (15, True)

    async def test_a_page_at_the_head_is_empty(self, store: Store, database: TestDatabase) -> None:
        database.fill(5)
        page = await page_of(store, 5, 5, 10)
        assert (len(page.chunk), page.chunk.start, page.chunk.end) == (0, 5, 5)
        assert not page.full

    async def test_a_page_covers_the_holes_up_to_the_head(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.execute("SELECT setval('label_id_seq', 10)")
        database.insert(2)
        database.execute("SELECT setval('label_id_seq', 20)")
        page = await page_of(store, 0, 20, 10)
        assert (list(page.chunk.seqs), page.chunk.end, page.floor) == ([11, 12], 20, 1)

    async def test_a_filter_hides_events_and_not_positions(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(30)
        filter = parse_filter([], [], ["spam"])
        pages = [
            page._replace(chunk=page.chunk.select(filter))
            for page in await all_pages(store, head=30, limit=10)
        ]
        assert [(page.chunk.start, page.chunk.end, page.full) for page in pages] == [
            (0, 10, True),
            (10, 20, True),
            (20, 30, True),
            (30, 30, False),
        ]
        spam = [e for e in database.stored() if e["labels"][0]["val"] == "spam"]
        assert data(pages) == frames(spam)


async def page_of(store: Store, cursor: int, head: int, limit: int) -> Page:
    return encoded(await store.page(cursor, head, limit))


def encoded(page: PageRows) -> Page:
    chunk = encode_rows(page.rows, start=page.start, end=page.end, with_keys=True)
    return Page(chunk, page.full, page.floor, page.lasts_until)


async def all_pages(store: Store, *, head: int, limit: int) -> list[Page]:
    pages = [await page_of(store, 0, head, limit)]
    while pages[-1].full:
        pages.append(await page_of(store, pages[-1].chunk.end, head, limit))
    return pages


def data(pages: Iterable[Page]) -> bytes:
    chunks: list[Chunk] = [page.chunk for page in pages]
    return b"".join(chunk.data for chunk in chunks if chunk.seqs)


class TestFloor:
    def retain(self, database: TestDatabase, floor: int) -> None:
        database.execute("UPDATE label_stream SET floor = %s", (floor,))
        database.execute("DELETE FROM label WHERE id < %s", (floor,))

    async def test_a_page_that_begins_where_the_cursor_ended_is_not_outdated(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(30)
        self.retain(database, 11)
        for cursor in (10, 15):
            assert (await page_of(store, cursor, 30, 10)).floor <= cursor + 1

    async def test_a_page_after_a_cursor_below_the_floor_tells_it(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(30)
        self.retain(database, 11)
        page = await page_of(store, 5, 30, 10)
        assert page.floor == 11
        assert list(page.chunk.seqs) == list(range(11, 21))

    async def test_a_floor_raised_between_two_pages_is_told_by_the_second(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(40)
        first = await page_of(store, 0, 40, 10)
        assert first.floor == 1
        self.retain(database, 21)
        second = await page_of(store, first.chunk.end, 40, 10)
        assert second.floor == 21 > second.chunk.start + 1
        assert second.chunk.data == frames(database.stored()[:10])

    async def test_a_floor_raised_before_its_rows_went_is_not_told_early(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(40)
        database.execute("UPDATE label_stream SET floor = 21")
        # The rows are still there, and a reader still gets every one of them.
        page = await page_of(store, 0, 40, 10)
        assert page.floor <= page.chunk.start + 1
        assert list(page.chunk.seqs) == list(range(1, 11))

    async def test_a_floor_above_everything_is_told_by_an_empty_page(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.fill(10)
        self.retain(database, 11)
        page = await page_of(store, 3, 10, 10)
        assert (len(page.chunk), page.chunk.end, page.floor) == (0, 10, 11)

    async def test_a_hole_of_a_rollback_is_not_taken_for_retention(
        self, store: Store, database: TestDatabase
    ) -> None:
        database.execute("SELECT setval('label_id_seq', 5)")
        database.insert()
        assert (await page_of(store, 0, 6, 10)).floor == 1


#: What the planner may know of the table: nothing after a bulk load or an upgrade, what it was
#: when it was small, what it is.
STATISTICS: dict[str, list[str]] = {
    "missing": ["INSERT"],
    "stale": ["ANALYZE label", "INSERT"],
    "present": ["INSERT", "ANALYZE label"],
}
#: Every other event is of one key, the others are of a key of their own.
HOT = f"""
    INSERT INTO label (src, uri, cid, val, neg, cts)
    SELECT '{ALICE}', 'at://{BOB}/app.bsky.feed.post/' || n * (n % 2), '', 'spam', n % 5 = 0, 'now'
      FROM generate_series(1, 6000) AS n
"""
SMALL = HOT.replace("6000", "10")


class TestState:
    @pytest.mark.parametrize("statistics", STATISTICS)
    @pytest.mark.parametrize(
        ("name", "looked_at"),
        [
            ("passing_after", 1000),
            ("still_in_force", 1000),
            ("query_exact", 1000),
            ("query_prefix", 1000),
        ],
    )
    def test_what_a_page_reads_does_not_grow_with_the_events_of_a_key(
        self, database: TestDatabase, name: str, looked_at: int, statistics: str
    ) -> None:
        database.execute("ALTER TABLE label SET (autovacuum_enabled = off)")
        database.execute(SMALL)
        for step in STATISTICS[statistics]:
            database.execute(HOT if step == "INSERT" else step)
        given = {"cursor": 0, "until": 6010, "in_force": True, "keys_are_unique": False}
        given |= {"window": 1000, "limit": 250, "seqs": list(range(1, 1001))}
        given |= {"sources": [], "values": [], "unsigned": True, "newest": True}
        hot = f"at://{BOB}/app.bsky.feed.post/0"
        given |= {"uris": [hot] if name == "query_exact" else [], "prefixes": []}
        given |= {"pattern": hot + "%", "head_pattern": hot[:10] + "%"}
        [(found,)] = database.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {block(name)}", given
        )
        plan = found[0]["Plan"]
        # For each row: the levels of an index, and the table, at most twice.
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 8 * looked_at

    async def test_keys_of_the_same_hash_are_told_apart(
        self, store: Store, database: TestDatabase
    ) -> None:
        # What is hashed is the fields with a space between.
        for cid, val in (("a", "b c"), ("a b", "c"), ("a", "b c"), ("a b", "c")):
            database.insert(1, cid=cid, val=val)
        database.insert(1, cid="a", val="b c", neg=True)
        page = encoded(await store.snapshot_page(0, Snapshot(5, resumed=False), 10, None))
        assert list(page.chunk.seqs) == [4]
        page = encoded(await store.snapshot_page(0, Snapshot(4, resumed=False), 10, None))
        assert list(page.chunk.seqs) == [3, 4]
        assert [row.seq for row in (await store.query(None, 0, 4, 10, in_force=True)).rows] == [
            3,
            4,
        ]

    async def test_where_each_key_has_one_row_nothing_newer_is_looked_for(
        self, store: Store, database: TestDatabase
    ) -> None:
        assert not store.schema.keys_are_unique
        database.execute("DROP INDEX label_key_idx")
        for wrong in ("(val, src, uri)", "(src, uri, cid, left(val, 9))", "(src, uri, cid, neg)"):
            database.execute(f"CREATE UNIQUE INDEX wrong ON label {wrong}")
            await store.schema.check()
            assert not store.schema.keys_are_unique, wrong
            database.execute("DROP INDEX wrong")
        database.execute("CREATE UNIQUE INDEX ON label (val, src, uri, cid)")
        await store.schema.check()
        assert store.schema.keys_are_unique
        for number in range(6):
            database.insert(1, val=f"value-{number}", neg=number % 3 == 0)
        page = encoded(await store.snapshot_page(0, Snapshot(5, resumed=False), 10, None))
        assert (list(page.chunk.seqs), page.chunk.end) == ([2, 3, 5], 5)
        page = encoded(await store.snapshot_page(2, Snapshot(5, resumed=True), 10, None))
        assert list(page.chunk.seqs) == [3, 4, 5]
        found = await store.query(None, 0, 5, 10, in_force=True)
        assert [row.seq for row in found.rows] == [2, 3, 5]
        assert [row.seq for row in await store.still_in_force([1, 2, 6], 5)] == [2]


#: What LIKE and arrays give a meaning to, and what indexes and string limits end at.
ODD = [
    "at://a%b/c",
    "at://a%25b/c",
    "at://axb/c",
    "at://a_b/c",
    "at://a\\b/c",
    "at://a\\\\b/c",
    "at://a\\%b/c",
    "at://a'b/c",
    'at://a"b/c',
    "at://a{b},c/c",
    "at://a%",
    "at://a_",
    "at://a\\",
    "at://NULL",
    "NULL",
    "at://ünïcode/Ünïcode",
    "at://\U0001f600/" + "\U0001f600" * 700,
    *("at://long/" + "x" * (length - 10) for length in (599, 600, 601, 602, 1000)),
    "at://long/" + "x" * 590 + "y",
    "at://long/" + "x" * 590 + "%",
    "at://long/" + "x" * 590 + "_z",
    "at://longest/" + "".join(random.Random(1).choices("abcdefghij0123456789", k=8192 - 13)),
]
VALUES = ["spam", "!hide", "it's", "a\\b", "%"]


@pytest.fixture
async def table(database: TestDatabase) -> list[dict[str, Any]]:
    """A table of odd labels in random order with holes; returns all of its events."""
    chance = random.Random(7)
    with database.connect(autocommit=False) as session, session.cursor() as cursor:
        for _ in range(300):
            cursor.execute(
                "INSERT INTO label (src, uri, cid, val, cts) VALUES (%s, %s, '', %s, 'now')",
                (
                    chance.choice([ALICE, BOB, CAROL]),
                    chance.choice(ODD),
                    chance.choice(VALUES),
                ),
            )
            if chance.random() < 0.2:
                cursor.execute("SELECT nextval('label_id_seq')")
    return database.stored()


def naive(
    table: list[dict[str, Any]], filter: Filter | None, cursor: int, head: int, limit: int
) -> list[dict[str, Any]]:
    """What a query must answer, said once more and without SQL."""
    found = []
    for event in table:
        [label] = event["labels"]
        if not cursor < event["seq"] <= head:
            continue
        if filter is not None:
            if filter.sources and label["src"] not in filter.sources:
                continue
            if filter.values and label["val"] not in filter.values:
                continue
            if (filter.uris or filter.uri_prefixes) and not (
                label["uri"] in filter.uris
                or any(label["uri"][: len(prefix)] == prefix for prefix in filter.uri_prefixes)
            ):
                continue
        found.append(event)
    return found[:limit]


class TestQueries:
    async def test_a_whole_uri_is_taken_literally(
        self, store: Store, table: list[dict[str, Any]]
    ) -> None:
        for uri in ODD:
            filter = Filter(uris=frozenset([uri]))
            rows = (await store.query(filter, 0, 10_000, 1000)).rows
            assert {row.uri for row in rows} == {uri}
            assert as_events(rows) == naive(table, filter, 0, 10_000, 1000), uri

    async def test_a_prefix_is_taken_literally(
        self, store: Store, table: list[dict[str, Any]]
    ) -> None:
        prefixes = {uri[:end] for uri in ODD for end in (3, 6, 7, 8, 12, 599, 600, 601, 602, 9000)}
        for prefix in sorted(prefixes):
            filter = Filter(uri_prefixes=(prefix,))
            rows = (await store.query(filter, 0, 10_000, 1000)).rows
            assert rows, prefix
            assert as_events(rows) == naive(table, filter, 0, 10_000, 1000), prefix

    async def test_a_prefix_that_nothing_begins_with_finds_nothing(
        self, store: Store, table: list[dict[str, Any]]
    ) -> None:
        for prefix in ("at://A", "at:/%", "at_//a", "at://long/" + "x" * 600 + "y", "x" * 9000):
            filter = Filter(uri_prefixes=(prefix,))
            assert await store.query(filter, 0, 10_000, 1000) == ([], 10_000)

    async def test_pages_in_order_are_what_a_naive_filter_of_the_table_finds(
        self, store: Store, table: list[dict[str, Any]]
    ) -> None:
        chance = random.Random(11)
        last = table[-1]["seq"]
        for _ in range(60):
            # Prefixes may cover each other and the URIs: each row still comes once.
            filter = Filter(
                sources=frozenset(chance.sample([ALICE, BOB, CAROL], chance.randint(0, 2))),
                uris=frozenset(chance.sample(ODD, chance.choice([0, 0, 1, 5]))),
                uri_prefixes=tuple(
                    uri[: chance.choice([5, 7, 600, 605])]
                    for uri in chance.sample(ODD, chance.choice([0, 1, 3]))
                ),
                values=frozenset(
                    chance.sample(["spam", "it's", "a\\b", "%"], chance.randint(0, 2))
                ),
            )
            cursor, head = sorted(chance.randint(0, last) for _ in range(2))
            limit = chance.choice([1, 7, 50])
            wanted = naive(table, filter, cursor, head, 10_000)
            found: list[dict[str, Any]] = []
            while cursor < head:
                rows, end = await store.query(filter, cursor, head, limit)
                assert len(rows) <= limit
                assert end > cursor
                found += as_events(rows)
                cursor = end
            assert found == wanted, filter

    async def test_without_a_filter_everything_up_to_the_head_is_found(
        self, store: Store, table: list[dict[str, Any]]
    ) -> None:
        head = table[200]["seq"]
        for filter in (None, Filter()):
            rows = (await store.query(filter, table[9]["seq"], head, 1000)).rows
            assert as_events(rows) == table[10:201]


def label(number: int = 0, **columns: Any) -> Label:
    given: dict[str, Any] = {
        "src": ALICE,
        "uri": f"at://{BOB}/app.bsky.feed.post/{number}",
        "cid": "",
        "val": "spam",
        "neg": False,
        "cts": "2026-01-01T00:00:00.000Z",
        "exp": None,
        "sig": None,
    }
    return Label(**{**given, **columns})


def stored_labels(labels: Iterable[Label]) -> list[dict[str, Any]]:
    return [dict(label_json(*given)) for given in labels]


class TestPublish:
    async def test_seqs_come_in_the_order_of_the_labels(
        self, store: Store, database: TestDatabase
    ) -> None:
        labels = [label(number) for number in random.Random(3).sample(range(1000), 500)]
        seqs = await LabelTable(store.database).insert(labels, None, b"")
        assert seqs == list(range(1, 501))
        stored = database.stored()
        assert [event["seq"] for event in stored] == seqs
        assert [event["labels"][0] for event in stored] == stored_labels(labels)

    async def test_every_column_is_kept_as_it_was_given(
        self, store: Store, database: TestDatabase
    ) -> None:
        labels = [
            label(),
            label(cid="bafyreia", neg=True, exp="2027-01-01T00:00:00Z", sig=bytes(range(256))),
            label(val='it\'s \\ "odd" {NULL,%s} %(x)s ünï \U0001f600', src="did:web:a%3A8080"),
            *(label(uri=uri) for uri in ODD),
        ]
        await LabelTable(store.database).insert(labels, None, b"")
        stored = database.stored()
        assert [event["labels"][0] for event in stored] == stored_labels(labels)
        assert database.execute("SELECT id FROM label WHERE neg IS NULL") == []

    async def test_all_are_stored_or_none(self, store: Store, database: TestDatabase) -> None:
        database.insert()
        before = database.stored()
        labels = [label(number) for number in range(50)]
        labels[40] = labels[40]._replace(cts=None)  # type: ignore[arg-type]
        with pytest.raises(DatabaseRefused) as caught:
            await LabelTable(store.database).insert(labels, None, b"")
        assert isinstance(caught.value.__cause__, psycopg2.IntegrityError)
        assert database.stored() == before

    async def test_no_label_is_no_seq(self, store: Store, database: TestDatabase) -> None:
        assert await LabelTable(store.database).insert([], None, b"") == []
        assert database.stored() == []


async def test_newest_counts_ids_that_were_given_up(store: Store, database: TestDatabase) -> None:
    assert await store.newest() == 0
    database.insert(3)
    assert await store.newest() == 3
    database.execute("SELECT nextval('label_id_seq')")
    assert await store.newest() == 4
