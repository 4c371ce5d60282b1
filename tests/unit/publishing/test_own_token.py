"""The publish token's file: made once, closed to others, the same after a restart."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sse_labels.errors import ConfigError
from sse_labels.publishing.own_token import FILE_NAME, keep_token, read_token


def test_it_is_made_where_it_is_looked_for(tmp_path: Path) -> None:
    token, path = keep_token(tmp_path)
    assert path == tmp_path / FILE_NAME
    assert read_token(path) == token
    assert path.read_text() == token + "\n"


def test_only_its_owner_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        _, path = keep_token(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_has_256_bits_that_fit_into_a_header(tmp_path: Path) -> None:
    token, _ = keep_token(tmp_path)
    # 32 bytes in base64url without padding (RFC 4648, section 5).
    assert len(token) == 43
    assert all(character.isalnum() or character in "-_" for character in token)
    assert token.isascii()


def test_each_server_has_its_own(tmp_path: Path) -> None:
    tokens = set()
    for number in range(5):
        directory = tmp_path / str(number)
        directory.mkdir()
        tokens.add(keep_token(directory)[0])
    assert len(tokens) == 5


def test_it_is_the_same_after_a_restart(tmp_path: Path) -> None:
    assert keep_token(tmp_path) == keep_token(tmp_path) == keep_token(tmp_path)


def test_a_restart_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory may have become read-only since."""
    kept = keep_token(tmp_path)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("something is being written"))
    assert keep_token(tmp_path) == kept


def test_a_token_that_somebody_wrote_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("  chosen-by-hand \n\n")
    (tmp_path / FILE_NAME).chmod(0o600)
    assert keep_token(tmp_path)[0] == "chosen-by-hand"
    assert (tmp_path / FILE_NAME).read_text() == "  chosen-by-hand \n\n"


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    keep_token(tmp_path)
    keep_token(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_of_two_servers_that_start_at_once_both_use_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    others: list[str] = []

    def slow_link(source: Path, target: Path) -> None:
        """Our token stands ready, and the other server is done before it gets its name."""
        monkeypatch.setattr(os, "link", link)
        others.append(keep_token(tmp_path)[0])
        link(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    token, path = keep_token(tmp_path)
    assert others == [token]
    assert read_token(path) == token
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_it_is_whole_from_the_moment_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    seen: list[tuple[bool, str]] = []

    def look_first(source: Path, target: Path) -> None:
        seen.append((Path(target).exists(), Path(source).read_text()))
        link(source, target)

    monkeypatch.setattr(os, "link", look_first)
    token, _ = keep_token(tmp_path)
    assert seen == [(False, token + "\n")]


def test_what_a_killed_run_left_behind_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container the process has the same number after every restart."""

    def killed(_source: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as first_run:
        first_run.setattr(os, "link", killed)
        first_run.setattr(Path, "unlink", lambda _path: None)
        with pytest.raises(KeyboardInterrupt):
            keep_token(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()
    assert len(list(tmp_path.iterdir())) == 1
    token, path = keep_token(tmp_path)
    assert read_token(path) == token


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\n"])
def test_an_empty_file_is_refused_and_not_taken_for_a_token(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    for take in (lambda: read_token(path), lambda: keep_token(tmp_path)):
        with pytest.raises(ConfigError, match="delete it to get a new one") as caught:
            take()
        assert caught.value.value == str(path)
    assert path.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_file_that_is_no_text_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b"s\xe9cret")
    with pytest.raises(ConfigError, match="ASCII") as caught:
        keep_token(tmp_path)
    assert "cret" not in str(caught.value)


def test_a_missing_file_is_a_config_error_for_who_only_reads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the token file"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize("name", ["a-file", "a-file/below", "missing"])
def test_a_directory_that_cannot_be_written_to_is_a_config_error(tmp_path: Path, name: str) -> None:
    # A file in the directory's place: unlike a mode, it stops root as well.
    (tmp_path / "a-file").write_text("")
    with pytest.raises(ConfigError, match="a directory to write to") as caught:
        keep_token(tmp_path / name)
    assert caught.value.key == "--data-dir"
    assert caught.value.value == str(tmp_path / name)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_server_does_not_believe_one_that_others_can_open(tmp_path: Path, mode: int) -> None:
    keep_token(tmp_path)
    (tmp_path / FILE_NAME).chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o} .delete it to get a new one"):
        keep_token(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    keep_token(tmp_path)


def test_a_server_does_not_believe_one_that_another_user_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = keep_token(tmp_path)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(ConfigError, match=f"belongs to the user ID {path.stat().st_uid} "):
        keep_token(tmp_path)
