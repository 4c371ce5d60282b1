"""Wrong requests: each is answered in JSON, named, and changes nothing.

Many cases share a server; all answers of a test are compared at once, so that a failure
shows every case that is answered otherwise.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from sse_labels.app import App
from sse_labels.config import Settings

from support.database import TestDatabase
from support.server import LABEL, PUBLISH_TOKEN, QUICK, Server, serving, until_head

QUERY_LABELS = "/xrpc/com.atproto.label.queryLabels"


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server, with the token; redirects and errors are answers like others."""
    async with httpx.AsyncClient(
        base_url=server.url,
        headers={"Authorization": f"Bearer {PUBLISH_TOKEN}"},
        verify=False,
    ) as opened:
        yield opened


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """Return status and name of an error, whose form is the same everywhere."""
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    body = answer.json()
    assert set(body) == {"error", "message"}
    assert isinstance(body["message"], str)
    assert body["message"]
    assert "Traceback" not in answer.text
    return answer.status_code, body["error"]


# Streams and queries

NOT_A_CURSOR = [
    *("-1", "+1", "1.5", "1e3", "0x10", "abc", "", " ", " 5", "5 ", "5\n", "5\x00", "1_000"),
    *("9" * 20, str(2**63), str(2**64), "9" * 5000),
    *("١٢", "５", "²", "5٣", "null", "NaN", "-0", "1,2", "\ufeff5"),
]


async def test_what_is_no_cursor_is_refused_before_a_stream_starts(
    server: Server, client: httpx.AsyncClient, database: TestDatabase
) -> None:
    database.insert(5)
    await until_head(server, 5)
    answers = {}
    for text in NOT_A_CURSOR:
        answers["query", text] = await client.get(f"/stream?cursor={quote(text)}")
        # HTTP itself takes spaces away from both ends of a header, and forbids CR, LF and NUL.
        if text.strip(" \n\x00") == text:
            header = [(b"Last-Event-ID", text.encode())]
            answers["header", text] = await client.get("/stream", headers=header)
    answers["header", "latin-1"] = await client.get(
        "/stream", headers=[(b"Last-Event-ID", b"\xb2")]
    )
    answers["query", "%ff"] = await client.get("/stream?cursor=%ff")
    # The header wins, but the query is looked at too.
    answers["both", "query"] = await client.get("/stream?cursor=x", headers={"Last-Event-ID": "5"})
    answers["both", "header"] = await client.get("/stream?cursor=5", headers={"Last-Event-ID": "x"})
    answers["two", "query"] = await client.get("/stream?cursor=1&cursor=1")
    answers["two", "headers"] = await client.get(
        "/stream", headers=[("Last-Event-ID", "1"), ("Last-Event-ID", "2")]
    )
    wanted = dict.fromkeys(answers, (400, "InvalidRequest"))
    for text in (str(2**63 - 1), "6", "0" * 18 + "6"):
        answers["query", text] = await client.get("/stream", params={"cursor": text})
        answers["header", text] = await client.get("/stream", headers={"Last-Event-ID": text})
        wanted |= {(where, text): (400, "FutureCursor") for where in ("query", "header")}
    assert {case: error_of(answer) for case, answer in answers.items()} == wanted
    assert "cursor" in answers["query", "abc"].json()["message"]
    assert "'abc'" in answers["query", "abc"].json()["message"]
    assert "Last-Event-ID" in answers["header", "abc"].json()["message"]
    assert len(answers["query", "9" * 5000].json()["message"]) < 200
    assert server.app.metrics.streams_ended == {}
    assert server.app.metrics.requests_refused == {
        "InvalidRequest": list(wanted.values()).count((400, "InvalidRequest")),
        "FutureCursor": 6,
    }


BAD_FILTERS = {
    "sources": [
        "",
        "x",
        "did:",
        "did:plc",
        "DID:plc:x",
        "did:plc:a*",
        "did:plc:x\n",
        "*",
        "did:é:x",
    ],
    "uriPatterns": ["", "x", "at://a*b", "**", "*x", "at://\x00*", "at://x\n", "a b", "at://x\r*"],
    "values": ["", "x" * 129, "é" * 65, "a\nb", "\x00", "\u2028"],
}


@pytest.mark.parametrize("path", ["/stream", QUERY_LABELS])
async def test_a_bad_filter_is_refused_before_anything_is_sent(
    server: Server, client: httpx.AsyncClient, path: str
) -> None:
    fine = {"uriPatterns": "*"} if path == QUERY_LABELS else {}
    answers = {}
    for name, texts in BAD_FILTERS.items():
        for text in texts:
            # Good ones beside it do not help.
            query = [*fine.items(), ("values", "spam"), (name, text)]
            answers[name, text] = await client.get(path, params=httpx.QueryParams(query))
        many = [*fine.items(), *((name, f"did:plc:{number}") for number in range(101))]
        answers[name, "101"] = await client.get(path, params=httpx.QueryParams(many))
    assert {case: error_of(answer) for case, answer in answers.items()} == dict.fromkeys(
        answers, (400, "InvalidRequest")
    )
    for (name, _), answer in answers.items():
        assert answer.json()["message"].startswith(name)
    assert server.app.metrics.streams_ended == {}


async def test_a_bad_query_is_refused(client: httpx.AsyncClient, database: TestDatabase) -> None:
    database.insert(3)
    queries = [
        *("", "?limit=10", "?sources=did:plc:x"),
        *(
            f"?uriPatterns=*&limit={limit}"
            for limit in ("0", "-1", "251", "x", "", "1.0", "٣", "9" * 30)
        ),
        "?uriPatterns=*&limit=1&limit=1",
        *(
            f"?uriPatterns=*&cursor={cursor}"
            for cursor in ("-1", "x", "", "1.5", "٣", 2**63, "9" * 30)
        ),
        "?uriPatterns=*&cursor=1&cursor=1",
    ]
    answers = {query: await client.get(QUERY_LABELS + query) for query in queries}
    assert {query: error_of(answer) for query, answer in answers.items()} == dict.fromkeys(
        queries, (400, "InvalidRequest")
    )


# Paths and methods


async def test_an_unknown_path_is_not_found(client: httpx.AsyncClient) -> None:
    answers = {
        (method, path): error_of(await client.request(method, path))
        for method, path in [
            *(("GET", path) for path in ("/nowhere", "/stream/", "/stream/1", "/labels/1")),
            *(
                ("GET", path)
                for path in ("/favicon.ico", "/%00", "/..%2f", "/health", "/xrpc/x.y.z")
            ),
            *(("POST", "/nowhere"), ("DELETE", "/nowhere"), ("PUT", "/labels/1")),
        ]
    }
    assert answers == dict.fromkeys(answers, (404, "NotFound"))


async def test_a_wrong_method_is_told_the_right_ones(client: httpx.AsyncClient) -> None:
    allowed = {}
    for method, path in [
        ("POST", "/stream"),
        ("DELETE", "/stream"),
        ("GET", "/labels"),
        ("PUT", "/labels"),
        ("POST", QUERY_LABELS),
        ("POST", "/health/live"),
        ("POST", "/metrics"),
        ("PATCH", "/"),
    ]:
        answer = await client.request(method, path)
        assert error_of(answer) == (405, "MethodNotAllowed"), (method, path)
        allowed[method, path] = set(answer.headers["Allow"].split(", ")) - {"OPTIONS", "HEAD"}
    assert allowed == {case: {"POST"} if case[1] == "/labels" else {"GET"} for case in allowed}


# Publishing


async def post(client: httpx.AsyncClient, body: Any) -> httpx.Response:
    """Publish a body: bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post("/labels", content=content)


BAD_BODIES: list[Any] = [
    *(b"", b" ", b"{", b"labels", b'{"labels":[}', b'{"labels":[{}],}', b'{"labels":[{}]} x'),
    *(b"\xff", b'{"labels":["\xff"]}', b'{"labels":["\xed\xa0\x80"]}', b"\x00", b"\xef\xbb\xbf{}"),
    *(b"[" * 100_000, b'{"labels":' + b"[" * 100_000, b'{"labels":' * 50_000),
    *([], [LABEL], "x", 1, None, True, {}),
    *({"labels": value} for value in ([], {}, None, "x", 1, LABEL, True)),
    *({"labels": [LABEL], name: 1} for name in ("label", "Labels", "", "labels ", "\ud800")),
]


async def test_a_bad_body_is_refused(client: httpx.AsyncClient, database: TestDatabase) -> None:
    before = database.insert(1)
    answers = [error_of(await post(client, body)) for body in BAD_BODIES]
    assert answers == [(400, "InvalidRequest")] * len(BAD_BODIES)
    assert [event["seq"] for event in database.stored()] == before


def broken(field: str, value: Any) -> dict[str, Any]:
    """Return a label of which one field is wrong."""
    return {**LABEL, field: value}


IN_TEXT = ("\r", "\n", "\r\n", "\x00", "\ud800", "\udfff", "\u0085", "\u2028", "\x1b")
BAD_LABELS: list[tuple[str, Any]] = [
    # Characters that would break a frame, a row or a terminal, in each field that is a text.
    *((field, broken(field, LABEL[field] + bad)) for field in LABEL for bad in IN_TEXT),
    *((field, broken(field, bad + LABEL[field])) for field in LABEL for bad in IN_TEXT),
    *(("cid", broken("cid", "bafyreiabcdef" + bad)) for bad in IN_TEXT),
    *(("exp", broken("exp", "2026-01-01T00:00:00Z" + bad)) for bad in IN_TEXT),
    *(("sig", broken("sig", {"$bytes": "AAAA" + bad})) for bad in IN_TEXT),
    ("src", broken("src", "did:plc:x\ndata: forged")),
    # Wrong types.
    *(
        (field, broken(field, bad))
        for field in LABEL
        for bad in (None, 1, True, [], {}, [LABEL[field]])
    ),
    *(("cid", broken("cid", bad)) for bad in (None, 1, True, [], {}, "", {"$link": "bafyreiabc"})),
    *(("exp", broken("exp", bad)) for bad in (None, 1, True, [], {}, "", "tomorrow")),
    *(("neg", broken("neg", bad)) for bad in (None, 0, 1, "true", [], {})),
    *(("ver", broken("ver", bad)) for bad in (None, 0, 2, "1", True, 1.0, 10**30)),
    *(("sig", broken("sig", bad)) for bad in (None, "AAAA", 1, [], {}, {"$bytes": None})),
    *(("sig", broken("sig", {"$bytes": bad})) for bad in ("", "A", "A===", "AA-_", "*", 5)),
    ("sig", broken("sig", {"$bytes": "AAAA", "more": 1})),
    # Missing, unknown, too long.
    *((field, {name: LABEL[name] for name in LABEL if name != field}) for field in LABEL),
    ("negated", broken("negated", True)),
    ("seq", broken("seq", 5)),
    ("val", broken("val", "")),
    ("val", broken("val", "x" * 129)),
    ("val", broken("val", "é" * 64 + "x")),
    ("uri", broken("uri", "at://" + "x" * 8192)),
    ("uri", broken("uri", "at://handle.example.com/nsid/rkey")),
    ("uri", broken("uri", LABEL["uri"] + "?query")),
    ("uri", broken("uri", "no uri")),
    ("src", broken("src", "did:plc:" + "x" * 2048)),
    ("src", broken("src", "at://did:plc:x")),
    ("cid", broken("cid", "Qm" + "x" * 44)),
    ("cts", broken("cts", "2026-02-30T00:00:00Z")),
    ("cts", broken("cts", "2026-01-01")),
    ("exp", broken("exp", "2026-01-01T00:00:00")),
]


async def test_a_bad_label_is_refused_by_index_and_field(
    client: httpx.AsyncClient, database: TestDatabase
) -> None:
    before = database.insert(1)
    for field, label in BAD_LABELS:
        answer = await post(client, {"labels": [LABEL, label]})
        assert error_of(answer) == (422, "InvalidLabel"), label
        message = answer.json()["message"]
        assert message.startswith(f"labels[1].{field}: "), label
        # What is shown of a wrong value is safe to print, and short.
        assert message.isprintable(), label
        assert len(message) < 400, label
    for bad in (None, 1, "x", [], True):
        answer = await post(client, {"labels": [bad]})
        assert error_of(answer) == (422, "InvalidLabel")
        assert answer.json()["message"].startswith("labels[0]: ")
    assert [event["seq"] for event in database.stored()] == before


async def test_too_many_labels_are_refused(
    client: httpx.AsyncClient, database: TestDatabase
) -> None:
    answer = await post(client, {"labels": [{}] * 10_001})
    assert error_of(answer) == (413, "PayloadTooLarge")
    assert "10001" in answer.json()["message"]
    assert database.stored() == []


@pytest.mark.parametrize("framing", ["Content-Length", "chunked", "gzip"])
async def test_too_large_a_body_is_refused(
    client: httpx.AsyncClient, database: TestDatabase, framing: str
) -> None:
    body = json.dumps({"labels": [LABEL]}).encode()
    limit = 1024**2

    async def parts(size: int) -> AsyncIterator[bytes]:
        yield body
        for _ in range(len(body), size, 65536):
            yield b" " * 65536

    headers = {}
    if framing == "Content-Length":
        content: Any = body.ljust(limit + 1)
    elif framing == "chunked":
        content = parts(2 * limit)
    else:
        content = gzip.compress(body.ljust(20 * limit))
        headers["Content-Encoding"] = "gzip"
    answer = await client.post("/labels", content=content, headers=headers)
    assert error_of(answer) == (413, "PayloadTooLarge")
    assert database.stored() == []
    if framing == "Content-Length":
        answer = await client.post("/labels", content=body.ljust(limit))
        assert answer.status_code == 201


async def test_who_has_no_right_to_publish_is_refused(
    server: Server, database: TestDatabase
) -> None:
    wrong: list[str | bytes | None] = [
        *(None, "", "Bearer", "Bearer wrong", PUBLISH_TOKEN, f"Basic {PUBLISH_TOKEN}"),
        *(f"Bearer {PUBLISH_TOKEN}x", f"Bearer {PUBLISH_TOKEN[:-1]}", f"Bearer x {PUBLISH_TOKEN}"),
        *(f"Bearer {PUBLISH_TOKEN.upper()}", f"Bearer\t{PUBLISH_TOKEN}", f"Bearer{PUBLISH_TOKEN}"),
        *("Bearer é".encode(), b"Bearer \xff"),
    ]
    async with httpx.AsyncClient(base_url=server.url, verify=False) as client:
        for authorization in wrong:
            headers = {} if authorization is None else {"Authorization": authorization}
            # Whoever is unknown learns nothing about the body.
            for body in (json.dumps({"labels": [LABEL]}).encode(), b"{"):
                answer = await client.post("/labels", headers=headers, content=body)
                assert error_of(answer) == (401, "AuthRequired"), authorization
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                assert PUBLISH_TOKEN not in answer.text
        assert database.stored() == []
        answer = await client.post(
            "/labels",
            headers={"Authorization": f"bearer {PUBLISH_TOKEN}"},
            json={"labels": [LABEL]},
        )
        # The scheme's name is case-insensitive (RFC 9110, section 11.1).
        assert answer.status_code == 201


async def test_publishing_that_is_off_is_forbidden_to_everyone(database: TestDatabase) -> None:
    async with (
        serving(App(Settings(**QUICK), database.dsn, None)) as server,
        httpx.AsyncClient(base_url=server.url, verify=False) as client,
    ):
        await server.app.feed.sequencer.started.wait()
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer None"}):
            answer = await client.post("/labels", headers=headers, json={"labels": [LABEL]})
            assert error_of(answer) == (403, "Forbidden")
    assert database.stored() == []
