"""Verification: whatever one does to one event is found, and what is legal is not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.client.answers import ended
from sse_labels.protocol.label import Label, label_json
from sse_labels.protocol.signatures import SigningKey, Verdict
from sse_labels.protocol.xrpc import encode_labels
from sse_labels.publishing.keys import source_keys_in
from sse_labels.verify import crosscheck
from sse_labels.verify.continuity import HOLES_MAX, OTHER_SOURCES, Continuity, Event, Hole
from sse_labels.verify.crosscheck import (
    DIFFERING_MAX_PAGES,
    MORE_MAX_LABELS,
    PAGE_LABELS,
    Again,
    CrossCheck,
    NotCompared,
    QueryPage,
)
from sse_labels.verify.findings import HOPELESS, SHOWN_MAX, Findings, Kind
from sse_labels.verify.queries import query_url

SRC = "did:plc:" + "s" * 24
KEY = SigningKey(b"\x1f" * 32)


def label(number: int = 0, val: str = "spam", **more: Any) -> dict[str, Any]:
    return {
        "ver": 1,
        "src": SRC,
        "uri": f"at://did:plc:a/b/{number}",
        "val": val,
        "cts": "2026-01-01T00:00:00Z",
        **more,
    }


@st.composite
def tables(draw: st.DrawFn, fewest: int = 0, *, alike: bool = True) -> list[Event]:
    """Rows with holes; many labels are `alike`, so that seqs alone tell them apart."""
    steps = draw(st.lists(st.integers(1, 3), min_size=fewest, max_size=12))
    rows, seq = [], 0
    for step in steps:
        seq += step
        rows.append(Event(seq, label(draw(st.integers(0, 1)) if alike else seq)))
    return rows


class Server:
    """A server whose table is `rows`: queryLabels, and the stream read again."""

    def __init__(
        self,
        rows: Sequence[Event],
        stream: Sequence[Event] | None = None,
        *,
        keeps_rows: bool = True,
        parts: Sequence[int] = (PAGE_LABELS,),
    ) -> None:
        """`stream` is what it streams when asked again; an answer has `parts` labels, by turns."""
        self.rows = rows
        self.stream = stream
        self.keeps_rows = keeps_rows
        self.parts = itertools.cycle(parts)
        self.asked = 0

    def query(self, cursor: int, limit: int) -> QueryPage:
        self.asked += 1
        rest = [row for row in self.rows if row.seq > cursor]
        count = min(limit, next(self.parts))
        if count == 0 and rest and rest[0].seq - 1 > cursor:
            # It looked at rows that a filter hides.
            return QueryPage([], rest[0].seq - 1)
        count = max(count, 1)
        labels = [row.label for row in rest[:count]]
        return QueryPage(labels, rest[count - 1].seq if len(rest) > count else None)

    def again(self, cursor: int, until: int) -> Again:
        rows = self.rows if self.stream is None else self.stream
        return Again([row for row in rows if cursor < row.seq <= until], self.keeps_rows)

    def check(self, findings: Findings) -> CrossCheck:
        return CrossCheck(0, self.query, self.again, findings, self.wait)

    def wait(self, seconds: float) -> None:
        """Wait."""


Sent = tuple[str, str]


def sent(event: Event) -> Sent:
    """An event as it is on the wire: its id and its data."""
    return str(event.seq), json.dumps({"seq": event.seq, "labels": [event.label]})


def verified(events: Sequence[Sent], head: int, server: Server) -> tuple[Findings, CrossCheck]:
    """Verify a stream of these events up to the head, in pages of four."""
    findings = Findings()
    continuity = Continuity(0, None, findings)
    check = server.check(findings)
    with patch.object(crosscheck, "PAGE_LABELS", 4):
        for event in events:
            passed = continuity.event(*event)
            if passed is not None:
                check.take(passed)
                check.compare_when_full()
        continuity.moved(str(max(head, continuity.position)))
        continuity.close()
        check.compare(continuity.position)
        check.read_holes(continuity.holes)
    assert (check.ended, check.holes_ended) == (None, None)
    return findings, check


def found_in(events: Sequence[Sent], head: int, server: Server) -> Findings:
    return verified(events, head, server)[0]


def head_of(rows: Sequence[Event], more: int = 0) -> int:
    return rows[-1].seq + more if rows else more


# What is legal


@given(tables(), st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1))
def test_a_whole_stream_is_sound_whatever_its_holes_and_the_answers_of_queries(
    rows: list[Event], more: int, parts: list[int]
) -> None:
    events = [sent(row) for row in rows]
    findings, check = verified(events, head_of(rows, more), Server(rows, parts=parts))
    assert (findings.shown, check.same) == ([], len(rows))


@given(tables(), tables(fewest=1), st.lists(st.integers(0, 5), min_size=1))
def test_labels_that_come_meanwhile_are_none_that_were_lost(
    rows: list[Event], later: list[Event], parts: list[int]
) -> None:
    head = head_of(rows, 1)
    table = [*rows, *(Event(head + row.seq, row.label) for row in later)]
    assert found_in([sent(row) for row in rows], head, Server(table, parts=parts)).shown == []


@given(tables(fewest=1, alike=False), st.data(), st.booleans())
def test_a_row_that_moved_to_a_new_id_is_not_lost(
    rows: list[Event], data: st.DataObject, in_memory: bool
) -> None:
    chosen = data.draw(st.sets(st.sampled_from([row.seq for row in rows])))
    head = head_of(rows)
    table = [row for row in rows if row.seq not in chosen]
    moved = [row.label for row in rows if row.seq in chosen]
    for number, before in enumerate(moved, start=1):
        table.append(Event(head + number, {**before, "neg": True}))
    # A server that has the old row in memory streams it still.
    server = Server(table, rows if in_memory else None, keeps_rows=False)
    findings, check = verified([sent(row) for row in rows], head, server)
    assert (findings.shown, check.gone) == ([], len(moved))


@given(tables(fewest=1, alike=False), st.data())
def test_labels_that_are_deleted_meanwhile_are_not_lost(
    rows: list[Event], data: st.DataObject
) -> None:
    gone = data.draw(st.sets(st.sampled_from([row.seq for row in rows])))
    table = [row for row in rows if row.seq not in gone]
    findings, check = verified([sent(row) for row in rows], head_of(rows), Server(table))
    assert (findings.shown, check.gone) == ([], len(gone))


def test_below_a_floor_that_was_told_nothing_is_missing() -> None:
    rows = [Event(seq, label(seq)) for seq in range(1, 10)]
    findings = Findings()
    continuity = Continuity(0, None, findings)
    # Raised, and not all that lies below is deleted yet.
    check = Server(rows).check(findings)
    floor = continuity.info('{"name":"OutdatedCursor","message":"going on","floor":7}')
    assert floor == 7
    check.skip(floor)
    for row in rows[6:]:
        check.take(Event(row.seq, row.label))
        continuity.event(*sent(row))
    check.compare(9)
    assert (findings.shown, check.same, continuity.hole_count) == ([], 3, 0)
    assert continuity.news == ["OutdatedCursor: going on"]


def test_a_label_that_was_signed_later_is_the_same() -> None:
    rows = [Event(1, label()), Event(2, label(1))]
    table = [rows[0], Event(2, {**rows[1].label, "neg": False, "sig": {"$bytes": "AA"}})]
    for streamed in (rows, table):
        server = Server(table, streamed, keeps_rows=False)
        assert found_in([sent(row) for row in rows], 2, server).shown == []


def test_a_server_that_is_behind_is_waited_for() -> None:
    rows = [Event(seq, label(seq)) for seq in (1, 2, 3)]

    class Behind(Server):
        waits: ClassVar[list[float]] = []

        def wait(self, seconds: float) -> None:
            self.waits.append(seconds)
            self.rows = rows if seconds else rows[:2]

    server = Behind(rows[:2], rows)
    findings = Findings()
    check = server.check(findings)
    for row in rows:
        check.take(row)
    check.compare(3)
    assert (findings.shown, check.same, len(server.waits)) == ([], 3, 2)


# What is not


@given(tables(fewest=1), st.data())
def test_an_event_that_is_dropped_is_found(rows: list[Event], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(rows))
    found = found_in([sent(row) for row in rows if row != gone], head_of(rows), Server(rows))
    texts = [text for kind, text in found.shown if kind is Kind.LOST]
    assert any(text.startswith(f"seq {gone.seq} (") for text in texts), found.shown


@given(tables(fewest=1, alike=False), st.data())
def test_an_event_that_the_stream_never_brings_is_found(
    rows: list[Event], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(rows))
    left = [row for row in rows if row != gone]
    found = found_in([sent(row) for row in left], head_of(rows), Server(rows, left))
    assert found.counts == {Kind.LOST: 1}
    assert found.shown[0][1].endswith("lost by the stream, queryLabels has it")


@given(tables(fewest=1), st.data())
def test_an_event_that_is_doubled_is_found(rows: list[Event], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(rows) - 1))
    later = data.draw(st.integers(place + 1, len(rows)))
    events = [sent(row) for row in rows]
    events.insert(later, events[place])
    assert found_in(events, head_of(rows), Server(rows)).counts[Kind.ORDER] == 1


@given(tables(fewest=2), st.data())
def test_two_events_that_are_swapped_are_found(rows: list[Event], data: st.DataObject) -> None:
    first, second = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=2)))[:2]
    events = [sent(row) for row in rows]
    events[first], events[second] = events[second], events[first]
    assert found_in(events, head_of(rows), Server(rows)).counts[Kind.ORDER] >= 1


@given(tables(fewest=1), st.data())
def test_an_event_that_is_altered_is_found(rows: list[Event], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(rows) - 1))
    row = rows[place]
    altered = data.draw(
        st.sampled_from(
            [
                sent(Event(row.seq, {**row.label, "val": "rude"})),
                sent(Event(row.seq, {**row.label, "neg": True})),
                (str(row.seq), sent(Event(row.seq + 1, row.label))[1]),
                (str(row.seq + 1), sent(row)[1]),
                ("", sent(row)[1]),
                (str(row.seq), json.dumps({"seq": row.seq, "labels": []})),
                (str(row.seq), json.dumps({"seq": row.seq, "labels": [row.label] * 2})),
                (str(row.seq), sent(row)[1][:-1]),
            ]
        )
    )
    events = [sent(row) for row in rows]
    events[place] = altered
    assert found_in(events, head_of(rows), Server(rows)).total > 0


@given(tables(fewest=1, alike=False), st.data())
def test_a_label_that_only_queries_miss_is_found(rows: list[Event], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(rows))
    table = [row for row in rows if row != gone]
    found = found_in([sent(row) for row in rows], head_of(rows), Server(table, rows))
    assert found.counts == {Kind.LOST: 1}
    assert found.shown[0][1].endswith("lost by queryLabels, the stream had it")


def test_labels_that_queries_give_in_another_order_are_found() -> None:
    rows = [Event(seq, label(seq)) for seq in (1, 2, 3)]
    swapped = [Event(1, rows[1].label), Event(2, rows[0].label), rows[2]]
    assert found_in([sent(row) for row in rows], 3, Server(swapped, rows)).counts[Kind.LOST] == 2


def test_a_hole_that_the_second_reading_fills_is_found() -> None:
    rows = [Event(seq, label(seq)) for seq in (1, 2, 3)]
    findings = Findings()
    Server(rows).check(findings).read_holes([Hole(1, 2)])
    [(kind, text)] = findings.shown
    assert (kind, text.startswith("seq 2 (")) == (Kind.LOST, True)
    assert text.endswith("lost by the first reading, the second has it")


def test_a_reading_that_cannot_be_had_is_told_and_not_held_against_it() -> None:
    class Without(Server):
        def query(self, cursor: int, limit: int) -> QueryPage:
            raise NotCompared("answered 404")

    findings = Findings()
    check = Without([]).check(findings)
    check.take(Event(1, label()))
    check.compare(1)
    check.compare(2)
    assert (check.ended, findings.total, check.same) == ("answered 404", 0, 0)


def test_a_stream_that_differs_everywhere_is_not_compared_for_ever() -> None:
    rows = [Event(seq, label(seq)) for seq in range(1, 1000)]
    findings = Findings()
    check = Server(rows).check(findings)
    with patch.object(crosscheck, "PAGE_LABELS", 4):
        for row in rows:
            check.take(Event(row.seq, label(row.seq, "rude")))
            check.compare_when_full()
    assert check.ended == f"{DIFFERING_MAX_PAGES} pages differ, the rest was not compared"
    assert findings.counts[Kind.ALTERED] == 4 * DIFFERING_MAX_PAGES
    assert len(findings.shown) == SHOWN_MAX


def test_a_gap_of_any_width_takes_bounded_memory_and_time() -> None:
    rows = [Event(seq, label(seq)) for seq in range(1, 5000)]
    server = Server(rows)
    findings = Findings()
    check = server.check(findings)
    check.take(rows[0])
    check.take(rows[-1])
    check.compare(rows[-1].seq)
    assert MORE_MAX_LABELS < findings.counts[Kind.LOST] <= MORE_MAX_LABELS + PAGE_LABELS
    assert check.ended is not None
    assert check.ended.endswith("the rest was not compared: it differs by too much")
    assert server.asked < 20


def test_queries_that_never_get_there_are_given_up() -> None:
    class Endless(Server):
        def query(self, cursor: int, limit: int) -> QueryPage:
            return QueryPage([], cursor + 1)

    findings = Findings()
    check = Endless([]).check(findings)
    check.take(Event(2**40, label()))
    check.compare(2**40)
    assert check.ended == f"queryLabels did not get to seq {2**40} in 10000 answers"


# Whatever comes


numbers = st.integers().map(str) | st.just("9" * 5000)
news = st.builds(
    '{{"name":{0},"error":{0},"floor":{1},"cursor":{1},"message":{1}}}'.format,
    st.sampled_from(['"OutdatedCursor"', '"StreamOpened"', '"\\ud800"', "{}"]),
    numbers,
)


@given(st.text(), st.text() | news)
def test_no_event_is_an_error_of_ours(id_text: str, data: str) -> None:
    findings = Findings()
    continuity = Continuity(0, None, findings)
    continuity.event(id_text, data)
    continuity.moved(id_text)
    floor = continuity.info(data)
    assert floor is None or floor < 2**63
    continuity.ended(data)
    assert str(ended(data)).isprintable()
    assert all(text.isprintable() for _, text in findings.shown)
    assert findings.total > 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
odd_labels = st.dictionaries(
    st.sampled_from(["ver", "src", "uri", "val", "cts", "neg", "sig", "exp", "more"]), values
)


@given(st.lists(odd_labels, max_size=3), values)
def test_no_label_is_an_error_of_ours(labels: list[Any], seq: Any) -> None:
    findings = Findings()
    Continuity(0, None, findings).event("1", json.dumps({"seq": seq, "labels": labels}))
    assert findings.counts[Kind.MALFORMED] == len(labels)
    assert all(text.isprintable() for _, text in findings.shown)


@given(st.binary())
def test_no_frame_is_an_error_of_ours(payload: bytes) -> None:
    findings = Findings()
    assert Continuity(0, None, findings).frame(payload) is None or findings.total == 0


def test_a_socket_is_judged_by_its_seqs() -> None:
    findings = Findings()
    continuity = Continuity(0, None, findings)
    for seq in (1, 2, 5, 5, 4, 6):
        # Without the frame's head of RFC 6455: a length of two bytes.
        continuity.frame(encode_labels(seq, label(seq, sig={"$bytes": "AA"}))[4:])
    continuity.close()
    assert findings.shown == [
        (Kind.ORDER, "seq 5 came a second time, after 5"),
        (Kind.ORDER, "seq 4 came after 5"),
    ]
    assert (continuity.events, continuity.labels, continuity.malformed) == (6, 6, 0)
    assert continuity.holes == [Hole(2, 4)]
    assert continuity.signatures[SRC][Verdict.UNKNOWN] == 6


def test_an_end_that_claims_more_than_came_is_found() -> None:
    findings = Findings()
    continuity = Continuity(0, None, findings)
    continuity.event(*sent(Event(1, label())))
    continuity.ended('{"error":"ServerStopping","message":"soon","cursor":1}')
    assert findings.total == 0
    continuity.ended('{"error":"ServerStopping","cursor":3}')
    assert findings.shown == [(Kind.LOST, "the server says that it sent all up to 3, 1 came last")]


def test_memory_does_not_grow_with_what_is_wrong() -> None:
    findings = Findings()
    continuity = Continuity(0, None, findings)
    for seq in range(2, 4 * HOPELESS, 2):
        continuity.event(*sent(Event(seq, {**label(), "src": f"did:web:s{seq}"})))
        continuity.event("x", "y")
        continuity.info('{"name":"Weather","message":"rain"}')
    assert len(continuity.holes) == HOLES_MAX
    assert continuity.hole_count == continuity.hole_seqs == 2 * HOPELESS - 1
    assert len(continuity.signatures) == 1001
    assert OTHER_SOURCES in continuity.signatures
    assert len(findings.shown) == SHOWN_MAX
    assert len(continuity.news) == 20
    assert findings.hopeless


# Signatures


def test_signatures_are_counted_by_source_and_the_wrong_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{SRC} {KEY.did_key}\n")
    findings = Findings()
    continuity = Continuity(0, source_keys_in(file), findings)
    plain = Label(SRC, "did:web:a", "", "spam", None, "2026-01-01T00:00:00Z", None, None)
    signed = KEY.sign(plain)
    other = signed._replace(src="did:web:other")
    for seq, each in enumerate((plain, signed, signed._replace(val="rude"), other), start=1):
        continuity.event(*sent(Event(seq, label_json(*each))))
    counted = {src: list(counts.values()) for src, counts in continuity.signatures.items()}
    # Valid, invalid, unsigned, unknown.
    assert counted == {SRC: [1, 1, 1, 0], "did:web:other": [0, 0, 0, 1]}
    assert findings.shown == [
        (Kind.SIGNATURE, f"seq 3: the signature of 'rude' of 'did:web:a' is not one of '{SRC}'")
    ]


# The edges of reading


@pytest.mark.parametrize(
    ("stream", "query"),
    [
        ("http://a/stream", "http://a/xrpc/{}?uriPatterns=*"),
        ("http://a/x/stream?values=b&cursor=3", "http://a/x/xrpc/{}?values=b&uriPatterns=*"),
        ("https://a/xrpc/com.atproto.label.subscribeLabels?uriPatterns=c:*&epoch=e",
         "https://a/xrpc/{}?uriPatterns=c:*"),
        ("http://a:1/labels?access_token=t", "http://a:1/xrpc/{}?access_token=t&uriPatterns=*"),
    ],
)  # fmt: skip
def test_queries_go_where_the_stream_comes_from(stream: str, query: str) -> None:
    wanted = httpx.URL(query.format("com.atproto.label.queryLabels"))
    found = query_url(httpx.URL(stream))
    assert found.copy_with(query=None) == wanted.copy_with(query=None)
    assert found.params == wanted.params
