"""`sse-labels verify`: sound servers are called sound, and each way to be unsound is named.

Its counts are compared with the table, or with what an odd server really sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import pytest
from aiohttp import WSCloseCode, web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sse_labels.protocol.label import Label
from sse_labels.protocol.signatures import SigningKey
from sse_labels.protocol.xrpc import encode_error, encode_labels

from support.database import TestDatabase, insert_with, until
from support.ozone import OZONE_DID, account, ozone, record
from support.program import (
    QUICK_SERVER,
    Program,
    environment,
    failure,
    free_port,
    ran,
    ran_all,
    running,
)
from support.reading import Reader, reading

SRC = "did:plc:" + "s" * 24
KEY = SigningKey(b"\x1f" * 32)
#: What Ozone's database is known by, without what `unique_label_idx` is for.
OZONE_TABLES = """
CREATE TABLE label (
    id bigserial PRIMARY KEY, src varchar NOT NULL, uri varchar NOT NULL, cid varchar NOT NULL,
    val varchar NOT NULL, neg boolean NOT NULL, cts varchar NOT NULL, exp varchar, sig bytea,
    "signingKeyId" integer
);
CREATE TABLE moderation_event (id serial PRIMARY KEY);
CREATE TABLE signing_key (id serial PRIMARY KEY, key varchar NOT NULL);
"""


@contextmanager
def serving(database: TestDatabase, *more: str) -> Iterator[str]:
    """A server on the database; the value is its address."""
    with running("serve", *QUICK_SERVER, "--dsn", database.dsn, *more) as server:
        yield server.url()


def leave_hole(database: TestDatabase, ids: int) -> None:
    """Take ids and roll back."""
    database.execute("SELECT nextval('label_id_seq') FROM generate_series(1, %s)", (ids,))


def report_of(run: Program) -> dict[str, Any]:
    """The one object that a run with --json wrote."""
    assert "Traceback" not in run.errors, run.errors
    [line] = run.out
    report: dict[str, Any] = json.loads(line)
    return report


def kinds(report: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = report["counts"]
    return counts


def delivered(url: str) -> int:
    """How many events a server has written to its consumers."""
    text = httpx.get(f"{url}/metrics").text
    found = re.search(r"^sse_labels_events_delivered_total (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return int(float(found[1]))


# Sound servers


def test_a_sound_server_is_called_sound_and_its_counts_are_the_tables(
    database: TestDatabase,
) -> None:
    database.fill(400)
    leave_hole(database, 2)
    database.fill(300)
    leave_hole(database, 3)
    with serving(database) as url:
        lines, whole, part, filtered = ran_all(
            [
                (("verify", url), {}),
                (("verify",), {"SSE_LABELS_URL": url, "SSE_LABELS_JSON": "1"}),
                (("verify", f"{url}/stream?cursor=390", "--json"), {}),
                (("verify", f"{url}/stream?values=spam&values=rude", "--json"), {}),
            ]
        )
    stored = database.stored()
    assert [run.process.returncode for run in (lines, whole, part, filtered)] == [0, 0, 0, 0]
    assert lines.out[:6] == [
        f"address      {url}/stream",
        "events       700, seq 1 to 702; the head was 705",
        "holes        2, 5 seqs in them; 2 read again",
        "reconnects   0",
        "malformed    0",
        "cross-check  700 labels are the same in queryLabels",
    ]
    assert lines.out[6].startswith("signatures   not checked, no --source-keys-file")
    assert lines.out[-1] == "sound"
    assert lines.err == []
    report = report_of(whole)
    assert report["sound"] is True
    assert report["events"] == report["cross_check"]["same"] == len(stored)
    assert [report["first"], report["last"], report["head"]] == [1, 702, 705]
    assert report["holes"] == {"count": 2, "seqs": 5, "read_again": 2, "ended": None}
    sources = {event["labels"][0]["src"] for event in stored}
    assert {source: counts["unsigned"] for source, counts in report["signatures"].items()} == {
        source: sum(event["labels"][0]["src"] == source for event in stored) for source in sources
    }
    assert report_of(part)["cross_check"]["same"] == len(database.stored(after=390))
    filter = [event for event in stored if event["labels"][0]["val"] in ("spam", "rude")]
    assert report_of(filtered)["cross_check"]["same"] == len(filter)
    assert report_of(filtered)["holes"]["read_again"] == 100


def test_an_empty_server_is_sound(database: TestDatabase) -> None:
    with serving(database) as url:
        run = ran("verify", url, "--json")
    assert run.process.returncode == 0
    assert report_of(run)["events"] == 0


def test_a_server_that_is_killed_in_the_midst_is_read_on(database: TestDatabase) -> None:
    database.fill(40_000)
    arguments = ("serve", *QUICK_SERVER, f"--port={free_port()}", "--dsn", database.dsn)
    with running(*arguments) as server:
        url = server.url()
        with running("verify", url, "--json") as verify:
            asyncio.run(until(lambda: delivered(url) > 1000))
            server.end(signal.SIGKILL)
            with running(*arguments):
                assert verify.wait() == 0
    report = report_of(verify)
    assert report["reconnects"] >= 1
    assert report["events"] == report["cross_check"]["same"] == 40_000
    assert report["holes"]["count"] == 0
    assert "reconnecting after seq" in verify.errors


def test_what_comes_while_it_follows_is_verified_until_ctrl_c(database: TestDatabase) -> None:
    database.fill(10)
    with serving(database) as url, running("verify", url, "--follow", "--json") as verify:
        verify.wait_for("read up to the head, seq 10; following")
        database.fill(600)
        asyncio.run(until(lambda: delivered(url) == 610))
        verify.press_ctrl_c()
        assert verify.wait() == 0
    report = report_of(verify)
    read = [event for event in database.stored() if event["seq"] <= report["position"]]
    assert report["events"] == report["cross_check"]["same"] == len(read)
    assert report["interrupted"] is True


def test_what_is_committed_late_and_rolled_back_meanwhile_is_sound(database: TestDatabase) -> None:
    """Four writers at once, whose transactions commit in another order than they took their ids."""

    def write(seed: int) -> None:
        chance = random.Random(seed)
        connection = database.connect(autocommit=False)

        def execute(sql: str, parameters: Any) -> list[tuple[Any, ...]]:
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters)
                rows: list[tuple[Any, ...]] = cursor.fetchall()
                return rows

        for _ in range(40):
            for _ in range(chance.randint(1, 20)):
                # Few keys: many labels are alike.
                insert_with(execute, chance.randint(0, 5))
            connection.rollback() if chance.random() < 0.3 else connection.commit()

    with serving(database) as url, running("verify", url, "--follow", "--json") as verify:
        verify.wait_for("read up to the head, seq 0; following")
        with ThreadPoolExecutor() as writers:
            list(writers.map(write, range(4)))
        stored = database.stored()
        asyncio.run(until(lambda: delivered(url) == len(stored)))
        verify.press_ctrl_c()
        assert verify.wait() == 0
        whole = ran("verify", url, "--json")
    report = report_of(verify)
    read = [event for event in stored if event["seq"] <= report["position"]]
    assert report["events"] == report["cross_check"]["same"] == len(read)
    assert report["holes"]["count"] > 0
    assert report_of(whole)["cross_check"]["same"] == len(stored)


def test_rows_that_ozone_moves_are_not_lost(empty_database: TestDatabase) -> None:
    empty_database.execute(OZONE_TABLES)
    empty_database.insert(5, neg=False)
    with serving(empty_database) as url, running("verify", url, "--follow", "--json") as verify:
        verify.wait_for("following")
        # As Ozone changes a label: its row gets a new id.
        for seq in (2, 5):
            empty_database.execute(
                "UPDATE label SET id = nextval('label_id_seq'), neg = true WHERE id = %s", (seq,)
            )
        verify.end(signal.SIGTERM)
    report = report_of(verify)
    assert verify.process.returncode == 0, report
    assert report["cross_check"]["gone"] == 2
    assert report["findings"] == []


def test_labels_that_are_deleted_while_it_runs_are_not_lost(database: TestDatabase) -> None:
    database.fill(200)
    with serving(database) as url, running("verify", url, "--follow", "--json") as verify:
        verify.wait_for("following")
        with serving(database, "--retention-max-labels=10", "--retention-sweep-seconds=0.05"):
            asyncio.run(until(lambda: len(database.stored()) == 10 and floors(url) == ["191"]))
        assert verify.end(signal.SIGTERM) == 0
    report = report_of(verify)
    assert report["events"] == 200
    assert report["cross_check"] == {"same": 10, "gone": 190, "ended": None}


def test_retention_is_told_and_takes_nothing_from_soundness(database: TestDatabase) -> None:
    database.fill(30)
    with serving(database, "--retention-max-labels=10", "--retention-sweep-seconds=0.05") as url:
        asyncio.run(until(lambda: len(database.stored()) == 10))
        run = ran("verify", url, "--json")
    assert run.process.returncode == 0, run.output
    report = report_of(run)
    assert (report["events"], report["holes"]["count"]) == (10, 0)
    assert report["news"][0].startswith("OutdatedCursor: ")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_retention_took_is_in_no_ring(database: TestDatabase, workers: int) -> None:
    retention = ("--retention-max-labels=100", "--retention-sweep-seconds=0.5")
    with serving(database, *retention, f"--workers={workers}") as url:
        for _ in range(18):
            database.fill(100)
        asyncio.run(until(lambda: len(database.stored()) == 100))
        # The worker that does not delete has been told as well.
        asyncio.run(until(lambda: floors(url) == ["1701"] * workers))
        run = ran("verify", url, "--json")
        assert run.process.returncode == 0, run.output
        report = report_of(run)
        # All that is kept, by the stream and by queries, whichever worker answers.
        for _ in range(4 * workers):
            again = asyncio.run(from_start(url, 1800))
            assert [news["floor"] for _, news in again.news] == [1701]
            assert again.events == database.stored()
        queried = httpx.get(
            f"{url}/xrpc/com.atproto.label.queryLabels", params={"uriPatterns": "*", "limit": 250}
        )
    assert len(queried.json()["labels"]) == 100
    assert (report["events"], kinds(report)) == (100, {})
    assert report["news"] == ["OutdatedCursor: cursor 0 is below the floor: going on from seq 1701"]


def floors(url: str) -> list[str]:
    """What each worker takes for the floor."""
    text = httpx.get(f"{url}/metrics").text
    return re.findall(r"^sse_labels_floor_seq\S* (\d+)", text, re.MULTILINE)


async def from_start(url: str, seq: int) -> Reader:
    """What a stream from the beginning brings up to a seq."""
    async with reading(f"{url}/stream", cursor=0) as reader:
        await reader.until_seq(seq)
    return reader


def test_a_protected_server_is_verified_with_a_token_that_nothing_shows(
    database: TestDatabase,
) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    now = int(time.time())
    token = jwt.encode({"iat": now, "exp": now + 60}, secret, "HS256")
    database.insert(3)
    arguments = ("serve", *QUICK_SERVER, "--dsn", database.dsn)
    with running(*arguments, env=environment(SSE_LABELS_JWT_SECRET=secret)) as server:
        url = server.url()
        socket = url.replace("http", "ws", 1)
        by_header, by_url, by_socket, refused, refused_socket = ran_all(
            [
                (("verify", url, "--json"), {"SSE_LABELS_TOKEN": token}),
                (("verify", f"{url}/stream?access_token={token}"), {}),
                (("verify", socket, "--quiet-seconds=0.5", "--token", token), {}),
                (("verify", url), {}),
                (("verify", socket), {}),
            ]
        )
    assert report_of(by_header)["cross_check"]["same"] == 3
    for run in (by_header, by_url, by_socket):
        assert run.process.returncode == 0
        assert token not in run.output + run.errors
    assert "answered 401, AuthRequired" in failure(refused)[1]
    assert "answered 401" in failure(refused_socket)[1]
    for each in (refused, refused_socket):
        assert "--token, or SSE_LABELS_TOKEN)" in failure(each)[1]


def test_a_full_server_is_waited_for_and_then_given_up(database: TestDatabase) -> None:
    database.insert(3)
    with (
        serving(database, "--max-streams=1") as url,
        running("tail", url, "--cursor=0") as tail,
    ):
        tail.wait_until(lambda: len(tail.out) == 3)
        refused = ran("verify", url, "--retry-seconds=2")
        with running("verify", url) as interrupted:
            interrupted.wait_for("reconnecting")
            interrupted.press_ctrl_c()
            assert interrupted.wait() == 130
        with running("verify", url, "--json") as waiting:
            waiting.wait_for("ended the stream: TooManyConnections: .*; reconnecting after")
            tail.end()
            assert waiting.wait() == 0
    assert "TooManyConnections: 1 streams are open, the most here; given up" in failure(refused)[1]
    assert report_of(waiting)["events"] == 3
    assert interrupted.out[-1] == "nothing is wrong so far; it was interrupted"


# Signatures


def signed(database: TestDatabase, tmp_path: Path) -> Path:
    """Store labels, right, wrong, without a signature and of a stranger; return the keys."""
    label = Label(SRC, "did:web:a", "", "spam", None, "2026-01-01T00:00:00Z", None, None)
    right = KEY.sign(label).sig
    for columns in (
        {"sig": right},
        {"sig": right, "val": "rude"},
        {"sig": None},
        {"sig": right, "src": "did:web:stranger"},
    ):
        database.insert(1, **{**label._asdict(), **columns})
    keys = tmp_path / "keys"
    keys.write_text(f"{SRC} {KEY.did_key}\n")
    return keys


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_a_wrong_signature_in_the_table_is_named(
    database: TestDatabase, tmp_path: Path, scheme: str
) -> None:
    keys = signed(database, tmp_path)
    with serving(database) as url:
        address = url.replace("http", scheme, 1)
        run = ran(
            "verify", address, "--source-keys-file", str(keys), "--json", "--quiet-seconds=0.5"
        )
        lines = ran("verify", address, "--quiet-seconds=0.5", env={
            "SSE_LABELS_SOURCE_KEYS_FILE": str(keys)
        })  # fmt: skip
        without = ran("verify", address, "--quiet-seconds=0.5", "--json")
    assert (run.process.returncode, without.process.returncode) == (1, 0)
    report = report_of(run)
    assert report["signatures"] == {
        SRC: {"valid": 1, "invalid": 1, "unsigned": 1, "unknown": 0},
        "did:web:stranger": {"valid": 0, "invalid": 0, "unsigned": 0, "unknown": 1},
    }
    assert kinds(report) == {"signature": 1}
    assert report["findings"][0]["text"].startswith("seq 2: the signature of 'rude' of 'did:web:a'")
    assert "signatures   1 valid, 1 invalid, 1 unsigned, 1 unknown" in lines.out
    assert f"             {SRC}: 1 valid, 1 invalid, 1 unsigned" in lines.out
    assert lines.out[-1] == "wrong: 1 signature"
    assert report_of(without)["signatures"][SRC]["unknown"] == 2


async def test_the_real_ozone_is_verified_by_its_own_socket_and_by_ours(
    empty_database: TestDatabase, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{OZONE_DID} {KEY.did_key}\n")
    async with ozone(empty_database) as labeler:
        await labeler.label(account("alice"), "spam", "rude")
        await labeler.label(record("alice", "3jzfcijpj2z2a"), "porn")
        await labeler.label(account("alice"), negate=("spam",))

        def verify_both() -> list[Program]:
            with serving(empty_database) as url:
                socket = labeler.url.replace("http", "ws", 1)
                more = ("--json", "--quiet-seconds=1", "--source-keys-file", str(keys))
                return ran_all([(("verify", at, *more), {}) for at in (socket, url)])

        theirs, ours = map(report_of, await asyncio.to_thread(verify_both))
    stored = empty_database.stored()
    for report in (theirs, ours):
        assert report["sound"] is True, report
        assert report["labels"] == len(stored) == 3
        assert report["signatures"] == {
            OZONE_DID: {"valid": 3, "invalid": 0, "unsigned": 0, "unknown": 0}
        }
    assert ours["cross_check"]["same"] == 3


# Odd servers of event streams


def label(number: int, **more: Any) -> dict[str, Any]:
    return {
        "ver": 1,
        "src": SRC,
        "uri": f"at://did:plc:a/b/{number}",
        "val": "spam",
        "cts": "2026-01-01T00:00:00Z",
        **more,
    }


def frame(seq: int, told: int | None = None, **more: Any) -> bytes:
    body = {"seq": seq if told is None else told, "labels": [label(seq, **more)]}
    return f"id: {seq}\ndata: {json.dumps(body)}\n\n".encode()


@dataclass
class Odd:
    """A server of seqs 1 to `head`, whose first stream is `first`, and whose table is `table`."""

    first: Sequence[bytes]
    head: int = 5
    #: What later streams and queries have; all by default.
    table: Sequence[int] = ()
    headers: dict[str, str] = field(default_factory=dict)
    #: A letter for each stream; the last one stays.
    epochs: str = "e"
    status: int = 200
    queries: Callable[[int, int], tuple[int, Any]] | None = None
    #: The Last-Event-ID of each stream.
    asked: list[str] = field(default_factory=list)

    def stream(self, cursor: int) -> bytes:
        opened = {"name": "StreamOpened", "cursor": cursor, "head": self.head}
        start = f"id: {cursor}\n\nevent: info\ndata: {json.dumps(opened)}\n\n".encode()
        if len(self.asked) == 1:
            return start + b"".join(self.first)
        rest = [frame(seq) for seq in self.seqs() if seq > cursor]
        return start + b"".join(rest) + b"id: %d\n\n" % self.head

    def query(self, cursor: int, limit: int) -> tuple[int, Any]:
        if self.queries is not None:
            return self.queries(cursor, limit)
        rest = [seq for seq in self.seqs() if seq > cursor]
        answer: dict[str, Any] = {"labels": [label(seq) for seq in rest[:limit]]}
        if len(rest) > limit:
            answer["cursor"] = str(rest[limit - 1])
        return 200, answer

    def seqs(self) -> Sequence[int]:
        return self.table or range(1, self.head + 1)


@contextmanager
def odd(server: Odd, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run it; the value is its address. Each stream ends when its bytes are written."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/stream":
                server.asked.append(self.headers["Last-Event-ID"])
                status, body = server.status, server.stream(int(server.asked[-1]))
                headers = {
                    "Content-Type": "text/event-stream",
                    "Sse-Labels-Head": str(server.head),
                    "Sse-Labels-Epoch": server.epochs[: len(server.asked)][-1],
                    **server.headers,
                }
            else:
                query = parse_qs(url.query)
                status, answer = server.query(int(query["cursor"][0]), int(query["limit"][0]))
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                headers = {"Content-Type": "application/json"}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            # One that has seen enough leaves.
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            """Say nothing of who did not shake hands."""

    made = Quiet(("127.0.0.1", 0), Handler)
    if tls is not None:
        # The handshake in the thread of the connection, and not before it is accepted.
        made.socket = tls.wrap_socket(made.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def verified(server: Odd, *more: str) -> Program:
    with odd(server) as url:
        return ran("verify", url, "--json", "--retry-seconds=3", *more)


POSITION = b"id: 5\n\n"


@pytest.mark.parametrize(
    ("first", "found", "text"),
    [
        ((1, 2, 3, 4, 5), {}, ""),
        ((1, 2, 4, 5), {"lost": 2}, "seq 3 ('spam' of 'at://did:plc:a/b/3'): lost by the"),
        ((2, 3, 4, 5), {"lost": 2}, "seq 1 ("),
        ((1, 2, 3, 4), {"lost": 2}, "seq 5 ("),
        ((1, 2, 2, 3, 4, 5), {"order": 1}, "seq 2 came a second time, after 2"),
        ((1, 2, 3, 4, 2, 5), {"order": 1}, "seq 2 came after 4"),
        ((1, 3, 2, 4, 5), {"order": 1, "lost": 2}, "seq 2 came after 3"),
    ],
)
def test_events_that_are_dropped_doubled_or_out_of_order_are_named(
    first: tuple[int, ...], found: dict[str, int], text: str
) -> None:
    run = verified(Odd([*map(frame, first), POSITION]))
    report = report_of(run)
    assert kinds(report) == found
    assert run.process.returncode == (1 if found else 0)
    assert any(finding["text"].startswith(text) for finding in report["findings"]) or not found
    assert report["events"] == len(first)


@pytest.mark.parametrize(
    ("event", "kind", "text"),
    [
        (frame(3, told=4), "event", "seq 3: the seq in its data is 4"),
        (frame(3, val="rude"), "altered", "seq 3 ('spam'"),
        (b"id: 3\ndata: nonsense\n\n", "event", "seq 3: its data is not JSON"),
        (b'id: 3\ndata: {"seq":3,"labels":[]}\n\n', "event", "seq 3: 0 labels, expected one"),
        (b"id: x\ndata: {}\n\n", "event", "the event's id is no seq: 'x'"),
        (frame(3, cts="soon"), "malformed", "seq 3: cts: got 'soon'"),
        (b"event: weather\ndata: rain\n\n", "event", "an event of the type 'weather'"),
        (b"\xff\xfe\n\n" + b"id: 3\ndata: \xff\n\n", "event", "seq 3: its data is not JSON"),
    ],
)
def test_an_event_that_is_not_as_described_is_named(event: bytes, kind: str, text: str) -> None:
    run = verified(Odd([frame(1), frame(2), event, frame(4), frame(5)]))
    report = report_of(run)
    assert run.process.returncode == 1
    found = [finding["text"] for finding in report["findings"] if finding["kind"] == kind]
    assert any(text in said for said in found), report


def test_a_label_that_queries_have_lost_is_named() -> None:
    def query(cursor: int, limit: int) -> tuple[int, Any]:
        return 200, {"labels": [label(seq) for seq in (1, 2, 4, 5) if seq > cursor][:limit]}

    report = report_of(verified(Odd([*map(frame, range(1, 6))], queries=query)))
    assert kinds(report) == {"lost": 1}
    assert report["findings"][0]["text"].endswith("lost by queryLabels, the stream had it")


def test_a_connection_that_is_cut_is_made_anew_after_the_last_id() -> None:
    # The last one is cut off before its empty line: it does not count.
    server = Odd([frame(1), frame(2), frame(3)[:-5]])
    run = verified(server)
    assert run.process.returncode == 0, run.output
    report = report_of(run)
    assert (report["events"], report["reconnects"], report["cross_check"]["same"]) == (5, 1, 5)
    assert server.asked == ["0", "2"]


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (404, {"error": "NotFound", "message": "Not Found"}, "answered 404, NotFound: Not Found"),
        (403, b"<html>no", "answered 403, Forbidden"),
        (200, b"<html>yes", "does not answer as its lexicon says"),
        (200, {"labels": [], "cursor": "0"}, "the cursor after 0 is '0'"),
        (200, {"labels": [label(n) for n in range(9)]}, "does not answer as its lexicon says"),
    ],
)
def test_without_queries_it_says_that_it_was_not_cross_checked(
    status: int, answer: Any, said: str
) -> None:
    with odd(
        Odd([*map(frame, range(1, 6))], queries=lambda cursor, limit: (status, answer))
    ) as url:
        run = ran("verify", url)
    assert run.process.returncode == 0, run.output
    [line] = [line for line in run.out if line.startswith("cross-check  none: ")]
    assert said in line
    assert run.out[-1] == "sound, as far as one reading tells"


def test_one_reading_is_enough_if_one_says_so() -> None:
    def never(cursor: int, limit: int) -> tuple[int, Any]:
        raise AssertionError("it was asked for labels")

    server = Odd([frame(1), frame(4), frame(5)], queries=never)
    report = report_of(verified(server, "--no-cross-check"))
    assert server.asked == ["0"]
    assert report["sound"] is True
    assert (report["holes"]["seqs"], report["holes"]["read_again"]) == (2, 0)


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (Odd([], headers={"Content-Type": "text/html"}), "is no event stream: it answers with"),
        (Odd([], status=404), "answered 404, Not Found"),
        (Odd([], headers={"Sse-Labels-Head": "?"}), "does not send its head"),
        (Odd([], status=302, headers={"Location": "/stream"}), "redirects"),
        (Odd([], status=302, headers={"Location": "http://a:b/"}), "Invalid URL in location"),
        (Odd([], headers={"Content-Encoding": "gzip"}), "Error -3 while decompressing"),
        (Odd([], status=503), "given up after"),
        (Odd([], status=400), "answered 400, Bad Request"),
    ],
    ids=["html", "404", "no head", "a circle", "nowhere", "no gzip", "503", "400"],
)
def test_what_is_no_stream_is_refused_in_one_line(server: Odd, said: str) -> None:
    with odd(server) as url:
        run = ran("verify", url, "--retry-seconds=1")
    status, line = failure(run)
    assert status == 1
    assert said in line
    assert line.startswith("sse-labels: http://127.0.0.1:")


@pytest.mark.parametrize(
    ("server", "text"),
    [
        (Odd([frame(1), b"data: " + b"x" * 2**21]), "sends a message of more than 1048576 bytes"),
        (Odd([frame(1) * 2000]), "given up: too much of it is wrong"),
        (
            Odd([b'event: error\ndata: {"error":"ServerStopping","cursor":9}\n\n']),
            "sent all up to 9",
        ),
    ],
    ids=["too large", "in circles", "claims more"],
)
def test_what_cannot_be_read_on_ends_with_a_report(server: Odd, text: str) -> None:
    run = verified(server)
    assert run.process.returncode == 1
    assert any(text in finding["text"] for finding in report_of(run)["findings"]), run.output


def test_a_server_that_goes_away_for_good_is_given_up(database: TestDatabase) -> None:
    database.fill(3)
    arguments = ("serve", *QUICK_SERVER, "--dsn", database.dsn)
    with (
        running(*arguments) as server,
        running("verify", server.url(), "--follow", "--json", "--retry-seconds=2") as verify,
    ):
        verify.wait_for("following")
        server.end(signal.SIGKILL)
        assert verify.wait() == 1
    report = report_of(verify)
    assert kinds(report) == {"stream": 1}
    assert "Connection refused; given up after" in report["findings"][0]["text"]
    assert report["events"] == 3
    assert "Connection refused; given up after" in report["cross_check"]["ended"]


def test_ctrl_c_ends_it_although_the_server_is_away(database: TestDatabase) -> None:
    database.fill(3)
    arguments = ("serve", *QUICK_SERVER, "--dsn", database.dsn)
    with (
        running(*arguments) as server,
        running("verify", server.url(), "--follow", "--json", "--retry-seconds=600") as verify,
    ):
        verify.wait_for("following")
        server.end(signal.SIGKILL)
        verify.wait_for("reconnecting after seq 3")
        verify.press_ctrl_c()
        assert verify.wait() == 0
    report = report_of(verify)
    assert (report["events"], report["interrupted"], report["findings"]) == (3, True, [])
    assert report["cross_check"]["ended"].endswith("given up after 0.0 s of waiting")


def test_another_epoch_is_another_stream() -> None:
    report = report_of(verified(Odd([frame(1), frame(2)], epochs="ab"), "--no-cross-check"))
    assert kinds(report) == {"stream": 1}
    assert report["findings"][0]["text"] == (
        "the epoch is 'b', it was 'a': seqs name other labels now"
    )


# WebSockets


@asynccontextmanager
async def labeler(
    talk: Callable[[web.WebSocketResponse, int], Any], tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A labeler that hands each socket, with its cursor, to `talk`, and writes what it returns."""

    async def subscribe(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        raw = await talk(socket, int(request.query["cursor"]))
        if raw is not None and request.transport is not None:
            request.transport.write(raw)
        return socket

    app = web.Application()
    app.router.add_get("/xrpc/com.atproto.label.subscribeLabels", subscribe)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield f"{'ws' if tls is None else 'wss'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def payload(seq: int) -> bytes:
    """What stands in the frame of an event: without RFC 6455's head of four bytes."""
    return encode_labels(seq, label(seq))[4:]


async def verified_socket(talk: Callable[[web.WebSocketResponse, int], Any]) -> dict[str, Any]:
    async with labeler(talk) as url:
        run = await asyncio.to_thread(
            ran, "verify", url, "--json", "--quiet-seconds=0.5", "--retry-seconds=2"
        )
    report = report_of(run)
    assert run.process.returncode == (0 if report["sound"] else 1)
    return report


async def silence(socket: web.WebSocketResponse) -> None:
    """Say nothing more until the other side leaves."""
    async for _ in socket:
        pass


async def test_a_labeler_that_is_never_quiet_is_read_up_to_what_is_new() -> None:
    async def talk(socket: web.WebSocketResponse, cursor: int) -> None:
        for seq in range(1, 6):
            await socket.send_bytes(payload(seq))
        while not socket.closed:
            seq += 1
            made = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            frame = encode_labels(seq, {**label(seq), "cts": made})
            await socket.send_bytes(frame[4:])
            with suppress(TimeoutError):
                await socket.receive(0.05)

    async with labeler(talk) as url:
        run = await asyncio.to_thread(ran, "verify", url, "--json", "--quiet-seconds=20")
    assert (run.process.returncode, report_of(run)["sound"]) == (0, True)
    assert report_of(run)["events"] >= 6


def test_our_own_subscription_ends_at_the_head_though_labels_keep_coming(
    database: TestDatabase,
) -> None:
    database.fill(30)
    with serving(database) as url:
        socket = url.replace("http", "ws", 1)
        run = ran("verify", socket, "--json", "--quiet-seconds=20")
        empty = ran("verify", f"{socket}?values=nobody", "--json", "--quiet-seconds=0.5")
    assert report_of(run)["events"] == 30
    assert report_of(empty)["events"] == 0


async def test_a_subscription_is_read_on_after_it_broke_off() -> None:
    cursors: list[int] = []

    async def talk(socket: web.WebSocketResponse, cursor: int) -> None:
        cursors.append(cursor)
        for seq in range(cursor + 1, min(cursor + 3, 6)):
            await socket.send_bytes(payload(seq))
        if cursor < 4:
            await socket.close(code=WSCloseCode.GOING_AWAY)
        await silence(socket)

    report = await verified_socket(talk)
    assert (report["sound"], report["events"], report["reconnects"]) == (True, 5, 2)
    assert cursors == [0, 2, 4]


async def test_a_subscription_that_goes_back_and_talks_nonsense_is_named() -> None:
    async def talk(socket: web.WebSocketResponse, cursor: int) -> None:
        for seq in (1, 2, 5, 3, 5, 6):
            await socket.send_bytes(payload(seq))
        await socket.send_bytes(b"\x00nonsense")
        await socket.send_str("hello")
        await silence(socket)

    report = await verified_socket(talk)
    assert kinds(report) == {"order": 2, "event": 2}
    assert (report["holes"]["count"], report["holes"]["seqs"]) == (1, 2)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"x" * 2**21, "Message size"),
        (encode_error("FutureCursor", "beyond")[2:], "ended the stream: FutureCursor: beyond"),
        (encode_error("ConsumerTooSlow", "slow")[2:], "given up after"),
    ],
    ids=["too large", "final", "again and again"],
)
async def test_a_subscription_that_cannot_go_on_ends_with_a_report(
    message: bytes, text: str
) -> None:
    async def talk(socket: web.WebSocketResponse, cursor: int) -> None:
        await socket.send_bytes(message)
        await socket.close()

    report = await verified_socket(talk)
    assert kinds(report) == {"stream": 1}
    assert text in report["findings"][0]["text"]


async def test_a_server_that_only_shakes_hands_is_named() -> None:
    async def talk(socket: web.WebSocketResponse, cursor: int) -> bytes:
        await socket.send_bytes(payload(1))
        # A frame with bits that are reserved (RFC 6455, section 5.2).
        return b"\xf2\x01x"

    report = await verified_socket(talk)
    assert (report["events"], kinds(report)) == (1, {"stream": 1})
    assert "it breaks the protocol: " in report["findings"][0]["text"]


def test_our_own_subscription_is_followed_through_a_restart(database: TestDatabase) -> None:
    database.fill(20)
    arguments = ("serve", *QUICK_SERVER, f"--port={free_port()}", "--dsn", database.dsn)
    with running(*arguments) as server:
        socket = server.url().replace("http", "ws", 1)
        with running("verify", socket, "--json", "--follow") as verify:
            asyncio.run(until(lambda: delivered(socket.replace("ws", "http", 1)) >= 20))
            server.end(signal.SIGKILL)
            verify.wait_for("reconnecting after seq 20")
            with running(*arguments) as again:
                again.url()
                database.fill(20)
                asyncio.run(until(lambda: delivered(socket.replace("ws", "http", 1)) >= 20))
                verify.press_ctrl_c()
                assert verify.wait() == 0
    report = report_of(verify)
    assert report["events"] == len(database.stored()) == 40
    assert report["reconnects"] == 1


# TLS


@pytest.fixture
def self_signed(tmp_path: Path) -> ssl.SSLContext:
    """What a server has until it gets a certificate that others trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, SHA256())
    )
    file = tmp_path / "certificate.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


async def test_a_certificate_that_nobody_trusts_is_refused_unless_one_says_so(
    self_signed: ssl.SSLContext,
) -> None:
    async def talk(socket: web.WebSocketResponse, cursor: int) -> None:
        await socket.send_bytes(payload(1))
        await silence(socket)

    def runs(*addresses: str) -> list[Program]:
        more = ("--json", "--quiet-seconds=0.5")
        cases = [
            (url, switch) for url in addresses for switch in ({}, {"SSE_LABELS_INSECURE": "1"})
        ]
        return ran_all([(("verify", url, *more), switch) for url, switch in cases])

    server = Odd([*map(frame, range(1, 6))])
    with odd(server, self_signed) as url:
        async with labeler(talk, self_signed) as socket:
            refused, taken, refused_socket, taken_socket = await asyncio.to_thread(
                runs, url, socket
            )
    for run in (refused, refused_socket):
        assert "certificate verify failed" in failure(run)[1].lower()
    assert report_of(taken)["events"] == 5
    assert report_of(taken_socket)["events"] == 1


# Asked wrongly


def test_what_is_asked_wrongly_is_named(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("nobody\n")
    cases = [
        (("verify", "localhost:8080"), {}, "URL: got 'localhost:8080', expected an address such"),
        (("verify", "ws://"), {}, "URL: got 'ws://', expected an address such"),
        (("verify", "http://a/stream?cursor=x"), {}, "URL: got 'http://a/stream?cursor=x', ex"),
        (("verify",), {"SSE_LABELS_URL": "ftp://a"}, "SSE_LABELS_URL: got 'ftp://a', expected"),
        (("verify", "--cursor=-1"), {}, "--cursor: got '-1', expected a whole number from 0"),
        (("verify", "--quiet-seconds=0"), {}, "--quiet-seconds: got '0', expected seconds from"),
        (("verify", "--source-keys-file", str(keys)), {}, f"--source-keys-file: got '{keys}', ex"),
        (("verify",), {"SSE_LABELS_FOLLOW": "2"}, "SSE_LABELS_FOLLOW: got '2', expected"),
    ]
    ended = ran_all([(arguments, env) for arguments, env, _ in cases])
    for program, (_, _, message) in zip(ended, cases, strict=True):
        status, said = failure(program)
        assert (status, said[: len(message) + 12]) == (2, f"sse-labels: {message}")
        assert len(program.err) == 1
