"""`sse-labels token`: the token it prints publishes, and what it keeps does not."""

from __future__ import annotations

import stat
from pathlib import Path

import httpx

from support.database import TestDatabase
from support.program import QUICK_SERVER, ran, running

LABEL = {
    "src": "did:web:labeler.example",
    "uri": "did:web:account.example",
    "val": "spam",
    "cts": "2026-01-01T00:00:00Z",
}


def status_of(url: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.post(f"{url}/labels", json={"labels": [LABEL]}, headers=headers).status_code


def test_token_that_is_printed_publishes_until_its_line_is_deleted(
    database: TestDatabase, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    made = ran("token", "first", f"--publish-tokens-file={file}")
    assert made.process.returncode == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    [first] = made.out
    serving = ("serve", *QUICK_SERVER, "--dsn", database.dsn, f"--publish-tokens-file={file}")
    with running(*serving) as server:
        url = server.wait_for(r"(http://\S+)")[1]
        assert status_of(url, first) == 201
        # What stands in the file is of no use.
        digest = file.read_text().split()[1]
        assert [status_of(url, kept) for kept in (digest, digest.removeprefix("sha256:"))] == [
            401,
            401,
        ]
        [second] = ran("token", "second", f"--publish-tokens-file={file}").out
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
        assert [status_of(url, first), status_of(url, second)] == [401, 201]
    assert len(database.stored()) == 2


def test_token_is_refused_without_a_file_or_with_a_name_twice(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    nowhere = ran("token", "first")
    assert (nowhere.process.returncode, nowhere.output) == (2, "")
    assert "--publish-tokens-file: not given, expected" in nowhere.errors
    assert ran("token", "first", f"--publish-tokens-file={file}").process.returncode == 0
    before = file.read_text()
    for arguments, complaint in [
        (("first",), "NAME: got 'first', expected a name that does not stand in"),
        (("a b",), "NAME: got 'a b', expected 1 to 64"),
        (("other", "--rights=all"), "--rights: got 'all', expected publish or admin"),
    ]:
        refused = ran("token", *arguments, f"--publish-tokens-file={file}")
        assert (refused.process.returncode, refused.output) == (2, "")
        assert complaint in refused.errors
    assert file.read_text() == before
