"""Clients over TLS: whom they trust, with a certificate that no authority has signed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import pytest

from support.database import TestDatabase
from support.nginx import Nginx, nginx
from support.program import QUICK_SERVER, Program, failure, ran, running

TOKEN = {"SSE_LABELS_PUBLISH_TOKEN": "a-token-for-tests"}
LABEL = {
    "src": "did:web:labeler.example",
    "uri": "did:web:account.example",
    "val": "spam",
    "cts": "2026-01-01T00:00:00Z",
}
#: Each ends by itself, or with what shows that it works.
COMMANDS: dict[str, Callable[[str, Path], Sequence[str]]] = {
    "tail": lambda url, file: ["tail", url, "--cursor=0", "--until-head"],
    "publish": lambda url, file: ["publish", str(file), "--url", url],
    "verify": lambda url, file: ["verify", url],
    "verify a WebSocket": lambda url, file: ["verify", url.replace("https:", "wss:")],
    "doctor": lambda url, file: ["doctor", url],
    "mirror": lambda url, file: ["mirror", "--any-source", url.replace("https:", "wss:")],
}


@pytest.fixture
def proxy(database: TestDatabase) -> Iterator[Nginx]:
    database.fill(3)
    # The doctor waits for a heartbeat.
    arguments = ("--dsn", database.dsn, "--heartbeat-seconds=0.2")
    with running("serve", *QUICK_SERVER, *arguments, env=TOKEN) as server:
        port = urlsplit(server.url()).port
        assert port is not None
        with nginx(port) as front:
            yield front


@pytest.mark.parametrize("name", COMMANDS)
def test_client_trusts_the_authorities_it_is_given(
    name: str, proxy: Nginx, empty_database: TestDatabase, tmp_path: Path
) -> None:
    file = tmp_path / "labels"
    file.write_text(json.dumps(LABEL))
    arguments = COMMANDS[name](f"https://localhost:{proxy.tls_port}", file)
    env = {**TOKEN, "SSE_LABELS_DSN": empty_database.dsn}
    for trusted, more in (
        (False, {}),
        (True, {"SSE_LABELS_CA_FILE": str(proxy.certificate)}),
        (True, {"SSE_LABELS_INSECURE": "true"}),
    ):
        with running(*arguments, env=env | more) as program:
            if trusted and name != "mirror":
                program.wait()
            assert is_well(program, name) if trusted else is_refused(program)


def is_refused(program: Program) -> bool:
    return bool(program.wait_for("CERTIFICATE_VERIFY_FAILED"))


def is_well(program: Program, name: str) -> bool:
    match name:
        case "mirror":
            return bool(program.wait_for("mirroring: upstream=wss"))
        case "doctor":
            return any(line.startswith("ok         address: a server") for line in program.out)
    return program.process.returncode == 0 and program.out != []


def test_file_without_a_certificate_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("nothing")
    for given, why in (("none", "no certificate"), ("missing", "No such file or directory")):
        status, said = failure(ran("tail", f"--ca-file={tmp_path / given}", "https://localhost"))
        assert status == 2
        assert f"got '{tmp_path / given}', expected a readable file of certificates, in" in said
        assert why in said
    both = ran("tail", f"--ca-file={certifi.where()}", env={"SSE_LABELS_INSECURE": "true"})
    assert failure(both) == (
        2,
        "sse-labels: --ca-file: got 'it and --insecure', expected one of the two",
    )
