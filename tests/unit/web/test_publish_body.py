"""`POST /labels` with any bytes at all: labels that are stored as they were meant, or a named 4xx.

The store is a list; everything in front of it is the real thing, without the socket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from sse_labels.config import Settings
from sse_labels.errors import InvalidLabel, InvalidRequest, PayloadTooLarge, RequestError
from sse_labels.metrics import Metrics
from sse_labels.protocol.label import Label, label_json, parse_label
from sse_labels.publishing.keys import Keys
from sse_labels.publishing.publisher import CHECKED_AT_ONCE, Publisher
from sse_labels.web.answers import error_response
from sse_labels.web.publish import PublishHandler

MAX_LABELS = 5
GOOD = {
    "src": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
    "uri": "at://did:plc:b/app.bsky.feed.post/3k",
    "val": "spam",
    "cts": "2026-01-01T00:00:00.000Z",
}
BODY = json.dumps({"labels": [GOOD, {**GOOD, "val": "é😀", "neg": True, "ver": 1}]}).encode()
#: What a parser of JSON stumbles over.
PIECES = [
    *(b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b"\\udc00", b"\\u0000"),
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xef\xbb\xbf", b"\n", b"\x1f", b"\xe2\x80\xa8"),
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"null", b"true", b"9" * 5000, b"1" * 40),
    *(b'"labels":', b'"\\ud800":1,', b"[" * 2000, b'{"a":' * 2000),
]


class Stored:
    """As much of a table and its schema as the publisher needs."""

    may_publish = True
    attached = False

    def __init__(self) -> None:
        self.labels: list[Label] = []

    async def insert(
        self, labels: Sequence[Label], _key: bytes | None, _fingerprint: bytes
    ) -> list[int]:
        self.labels += labels
        return list(range(len(labels)))


def handler() -> PublishHandler:
    unused: Any = None
    return PublishHandler(unused, unused, unused, max_labels=MAX_LABELS, body_seconds=1)


def publish(body: bytes) -> tuple[list[Label], RequestError | None]:
    """Return what this body stores, and what it is answered; any other error is a 500."""
    store: Any = Stored()
    answer = None
    # Nobody else has a turn here, so nothing waits for long.
    try:
        publishing = Publisher(store, store, Metrics(), Keys(Settings())).publish(
            handler()._labels(body)
        )
        while True:
            publishing.send(None)
    except StopIteration:
        pass
    except RequestError as error:
        answer = error
    return store.labels, answer


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good body of which some parts were replaced, cut out or doubled."""
    body = BODY
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(body)))
        end = begin + draw(st.sampled_from([0, 0, 1, 2, 10, 1000]))
        body = body[:begin] + draw(st.sampled_from([b"", *PIECES])) + body[end:]
    return body


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.just(GOOD),
    lambda inner: (
        st.lists(inner, max_size=7)
        | st.dictionaries(st.sampled_from(["labels", "", *GOOD]) | st.text(), inner)
    ),
)

good_labels = st.builds(
    lambda val, more: {**GOOD, "val": val, **more},
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=30),
    st.sampled_from([{}, {"neg": True}, {"neg": False}, {"ver": 1, "exp": GOOD["cts"]}]),
)


@settings(max_examples=250)
@given(
    spoilt()
    | st.binary()
    | st.lists(st.sampled_from(PIECES)).map(b"".join)
    | values.map(lambda value: json.dumps(value).encode())
    | st.lists(good_labels, min_size=1, max_size=MAX_LABELS + 1).map(
        lambda labels: json.dumps({"labels": labels}, ensure_ascii=False).encode()
    )
    | values.map(lambda value: json.dumps({"labels": value}).encode())
)
@example(b"")
@example(BODY)
@example(BODY.replace(b"spam", b"sp\xff"))
@example(BODY.replace(b"spam", b"sp\xed\xa0\x80"))
@example(b"[" * 100_000)
@example(b'{"labels":[' + b"9" * 100_000 + b"]}")
@example(b'{"labels":[],"\\ud800":1}')
@example(json.dumps({"labels": [GOOD], "x" * 5000: 1}).encode())
@example(json.dumps({"labels": [{**GOOD, "\udfff": 1}]}).encode())
@example(json.dumps({"labels": [GOOD] * (MAX_LABELS + 1)}).encode())
@example(json.dumps({"labels": [GOOD, {**GOOD, "val": "a\0"}]}).encode())
def test_any_body_is_stored_as_it_was_meant_or_refused_by_name(body: bytes) -> None:
    labels, refused = publish(body)
    if refused is None:
        event("stored")
        text = body.decode("utf-8")
        # The standard library, where it reads the same body at all, reads the same labels.
        try:
            meant = json.loads(text)
        except ValueError:
            return
        assert set(meant) == {"labels"}
        assert 1 <= len(labels) <= MAX_LABELS
        wanted = [
            {"ver": 1, **{name: value for name, value in label.items() if value is not False}}
            for label in meant["labels"]
        ]
        for label in wanted:
            label.pop("$type", None)
        assert [label_json(*label) for label in labels] == wanted
    else:
        event(refused.name)
        # All or none, and an answer that can be sent, read and logged.
        assert labels == []
        assert type(refused) in (InvalidRequest, InvalidLabel, PayloadTooLarge)
        assert len(str(refused).encode()) < 600
        assert str(refused).isprintable()
        answer = error_response(refused)
        assert answer.status == refused.status in (400, 413, 422)
        assert json.loads(answer.text or "")["error"] == refused.name


def test_the_body_that_is_spoilt_above_is_a_good_one() -> None:
    labels, refused = publish(BODY)
    assert refused is None
    assert [label.val for label in labels] == ["spam", "é😀"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"labels":', 400),
        (b'{"labels":"\xff"}', 400),
        (b'"labels"', 400),
        (b'{"labels":{}}', 400),
        (b'{"labels":"ab"}', 400),
        (b'{"labels":[]}', 400),
        (b'{"labels":[{}],"label":[]}', 400),
        (b'{"labels":[{}]}', 422),
        (b'{"labels":[[]]}', 422),
        (b'{"labels":[1,2,3,4,5,6]}', 413),
    ],
)
def test_each_kind_of_wrong_body_has_its_status(body: bytes, status: int) -> None:
    labels, refused = publish(body)
    assert labels == []
    assert refused is not None
    assert refused.status == status


async def test_requests_that_are_checked_at_once_leave_streams_their_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[int] = [0]

    def counting(obj: object) -> Label:
        checked[-1] += 1
        return parse_label(obj)

    monkeypatch.setattr("sse_labels.publishing.publisher.parse_label", counting)
    store: Any = Stored()
    publisher = Publisher(store, store, Metrics(), Keys(Settings()))
    requests, labels = 5, 4 * CHECKED_AT_ONCE + 1
    async with asyncio.TaskGroup() as tasks:
        for _ in range(requests):
            tasks.create_task(publisher.publish([GOOD] * labels, b"key"))
        # What has its turn here has it as a stream would.
        while len(store.labels) < requests * labels:
            await asyncio.sleep(0)
            checked.append(0)
    assert sum(checked) == requests * labels
    assert max(checked) == CHECKED_AT_ONCE


async def test_request_of_one_label_does_not_wait_for_large_ones() -> None:
    store: Any = Stored()
    publisher = Publisher(store, store, Metrics(), Keys(Settings()))
    async with asyncio.TaskGroup() as tasks:
        large = tasks.create_task(publisher.publish([GOOD] * (100 * CHECKED_AT_ONCE)))
        await asyncio.sleep(0)
        assert await publisher.publish([GOOD]) == [0]
        assert not large.done()
