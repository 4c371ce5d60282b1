"""Which publish tokens are known, how they change, and what never leaves the file."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import logging
import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from sse_labels import watched_file
from sse_labels.errors import ConfigError
from sse_labels.publishing.tokens import (
    ADMIN,
    PUBLISH,
    Holder,
    PublishTokens,
    add_token,
    digest_of,
    line_for,
    new_token,
)

PLAIN = "the-token-that-is-a-setting"
LONG_AGO = 1_000_000_000
_TIMES = itertools.count(LONG_AGO)


def write(file: Path, *lines: str, age: bool = True) -> None:
    """Write lines to the file; it is old by its times, so that only their change is seen."""
    file.write_text("".join(f"{line}\n" for line in lines))
    if age:
        os.utime(file, (LONG_AGO, next(_TIMES)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def refusal(file: Path, content: bytes, token: str | None = None) -> str:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        PublishTokens(token, file)
    message = str(caught.value)
    assert message.startswith(f"--publish-tokens-file: got {str(file)!r}, expected ")
    assert message.isprintable()
    return message


class TestKnowing:
    def test_without_any_token_nobody_is_known(self) -> None:
        tokens = PublishTokens()
        assert tokens.empty
        assert tokens.find("") is None
        assert tokens.find(PLAIN) is None

    def test_the_token_of_the_setting_may_publish(self) -> None:
        tokens = PublishTokens(PLAIN)
        assert not tokens.empty
        assert tokens.find(PLAIN) == Holder("publish-token", frozenset({PUBLISH}), digest_of(PLAIN))
        assert tokens.find(PLAIN + "x") is None
        assert tokens.find(PLAIN[:-1]) is None

    def test_each_token_of_the_file_has_its_name_and_its_rights(self, file: Path) -> None:
        made = [new_token() for _ in range(4)]
        rights = [{PUBLISH}, {ADMIN}, {PUBLISH, ADMIN}, set()]
        names = ["ozone", "ops@example", "both.1", "retired"]
        write(file, *map(line_for, names, made, rights))
        tokens = PublishTokens(PLAIN, file)
        for name, token, right in zip(names, made, rights, strict=True):
            assert tokens.find(token) == Holder(name, frozenset(right), digest_of(token))
        assert tokens.find(PLAIN) == Holder("publish-token", frozenset({PUBLISH}), digest_of(PLAIN))
        assert tokens.find(new_token()) is None

    def test_a_token_without_the_right_is_known_so_that_403_can_be_answered(
        self, file: Path
    ) -> None:
        token = new_token()
        write(file, line_for("reader", token, ()))
        holder = PublishTokens(None, file).find(token)
        assert holder is not None
        assert PUBLISH not in holder.rights

    def test_rights_are_publish_when_none_are_written(self, file: Path) -> None:
        write(file, f"ozone sha256:{hashlib.sha256(b'secret').hexdigest().upper()}")
        assert PublishTokens(None, file).find("secret") == Holder(
            "ozone", frozenset({PUBLISH}), digest_of("secret")
        )

    def test_comments_and_blank_lines_say_nothing(self, file: Path) -> None:
        token = new_token()
        file.write_bytes(
            f"# tokens\r\n\r\n  \t\n  {line_for('ozone', token)}  # until May\r\n#x".encode()
        )
        holder = PublishTokens(None, file).find(token)
        assert holder is not None
        assert holder.name == "ozone"

    def test_a_file_without_a_line_leaves_nobody(self, file: Path) -> None:
        write(file)
        assert PublishTokens(None, file).empty
        assert not PublishTokens(PLAIN, file).empty

    def test_a_token_that_no_encoding_knows_is_simply_unknown(self) -> None:
        assert PublishTokens(PLAIN).find("\udcff" * 3) is None


class TestConstantTime:
    @pytest.mark.parametrize("which", ["first", "last", "none"])
    def test_a_token_is_compared_with_every_one_that_is_known(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, which: str
    ) -> None:
        made = [new_token() for _ in range(5)]
        write(file, *(line_for(f"n{place}", token) for place, token in enumerate(made)))
        tokens = PublishTokens(PLAIN, file)
        compared: list[tuple[bytes, bytes]] = []
        original = hmac.compare_digest

        def compare(a: bytes, b: bytes) -> bool:
            compared.append((a, b))
            return original(a, b)

        monkeypatch.setattr(hmac, "compare_digest", compare)
        found = tokens.find({"first": PLAIN, "last": made[-1], "none": "x"}[which])
        assert (found is None) == (which == "none")
        assert len({known for _, known in compared}) == len(compared) == 6
        assert {len(side) for pair in compared for side in pair} == {32}


class TestBadFiles:
    DIGEST = "sha256:" + "0a" * 32

    @pytest.mark.parametrize(
        "line",
        [
            "ozone",
            f"{DIGEST}",
            f"ozone {DIGEST[:-1]}",
            f"ozone {DIGEST}0",
            f"ozone {DIGEST[7:]}",
            f"ozone md5:{DIGEST[7:]}",
            f"ozone {DIGEST} publish admin",
            "ozone SECRETSECRETSECRETSECRETSECRETSECRETSECRET1",
            f"{'n' * 65} {DIGEST}",
            f".ozone {DIGEST}",
            f"oz/one {DIGEST}",
            f"publish-token {DIGEST}",
            f"özone {DIGEST}",
            f"ozone {DIGEST} write",
            f"ozone {DIGEST} publish,",
            f"ozone {DIGEST} publish,publish",
            f"ozone {DIGEST} none,publish",
        ],
    )
    def test_a_bad_line_is_named_by_its_number_and_never_quoted(
        self, file: Path, line: str
    ) -> None:
        message = refusal(file, f"# one\n\n{line}\n".encode())
        assert "expected in line 3: " in message
        assert "0a0a" not in message
        assert "SECRET" not in message

    def test_bytes_that_are_no_text_are_refused(self, file: Path) -> None:
        assert "in line 1: UTF-8" in refusal(file, b"\xff\xfe\n")

    def test_a_name_stands_once(self, file: Path) -> None:
        lines = line_for("ozone", "a") + "\n" + line_for("ozone", "b")
        assert "in line 2: a name that no other line has" in refusal(file, lines.encode())

    def test_a_token_stands_once_or_its_rights_would_be_a_guess(self, file: Path) -> None:
        lines = line_for("one", "a") + "\n" + line_for("two", "a", ())
        assert "in line 2: a token that stands nowhere else" in refusal(file, lines.encode())

    def test_a_token_stands_in_the_file_or_as_the_setting(self, file: Path) -> None:
        line = line_for("one", PLAIN)
        assert "in line 1: a token that stands nowhere else" in refusal(file, line.encode(), PLAIN)

    def test_what_is_no_file_is_refused(self, file: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"expected a file to read \(No such file"):
            PublishTokens(None, file)
        with pytest.raises(ConfigError, match="expected a file of at most 1048576 bytes"):
            PublishTokens(None, tmp_path)
        os.mkfifo(file)
        with pytest.raises(ConfigError, match="expected a file of at most"):
            PublishTokens(None, file)

    def test_a_file_that_is_far_too_large_is_not_read(self, file: Path) -> None:
        with file.open("wb") as opened:
            opened.truncate(watched_file.FILE_MAX_BYTES + 1)
        with pytest.raises(ConfigError, match="expected a file of at most"):
            PublishTokens(None, file)


class TestRotation:
    def test_a_rewritten_file_counts_at_the_next_request(self, file: Path) -> None:
        old, new = new_token(), new_token()
        write(file, line_for("ozone-1", old))
        tokens = PublishTokens(None, file)
        write(file, line_for("ozone-1", old), line_for("ozone-2", new))
        assert tokens.find(old) is not None
        assert tokens.find(new) is not None
        write(file, line_for("ozone-2", new))
        assert tokens.find(old) is None
        assert tokens.find(new) is not None
        write(file)
        assert tokens.empty

    def test_a_file_that_was_replaced_counts_at_once(self, file: Path, tmp_path: Path) -> None:
        old, new = new_token(), new_token()
        write(file, line_for("ozone", old))
        tokens = PublishTokens(None, file)
        other = tmp_path / "draft"
        write(other, line_for("ozone", new))
        os.utime(other, ns=(file.stat().st_mtime_ns, file.stat().st_mtime_ns))
        other.rename(file)
        assert tokens.find(old) is None
        assert tokens.find(new) is not None

    def test_a_file_that_did_not_change_is_not_read_again(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        token = new_token()
        write(file, line_for("ozone", token))
        tokens = PublishTokens(None, file)
        monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read again"))
        assert tokens.find(token) is not None

    def test_a_young_file_is_read_again_though_its_times_stand_still(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = new_token(), new_token()
        monkeypatch.setattr(watched_file, "stamp_of", lambda status: (1,))
        write(file, line_for("ozone", old), age=False)
        tokens = PublishTokens(None, file)
        write(file, line_for("ozone", new), age=False)
        assert tokens.find(old) is None
        assert tokens.find(new) is not None

    def test_a_file_that_went_bad_changes_nothing_and_is_logged_once(
        self, file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        token, leaked = new_token(), new_token()
        write(file, line_for("ozone", token))
        tokens = PublishTokens(None, file)
        with caplog.at_level(logging.INFO):
            write(file, f"ozone {leaked}", age=False)  # young: it is parsed at every request
            for _ in range(3):
                assert tokens.find(token) is not None
            write(file, f"ozone {leaked}")
            for _ in range(3):
                assert tokens.find(token) is not None
            assert len(caplog.records) == 1
            assert "in line 1" in caplog.text
            write(file, line_for("other", leaked))
            assert tokens.find(leaked) is not None
            write(file, "ozone")
            assert tokens.find(leaked) is not None
            assert len(caplog.records) == 2
        assert leaked not in caplog.text

    def test_a_file_that_went_away_changes_nothing_until_it_is_back(
        self, file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        old, new = new_token(), new_token()
        write(file, line_for("ozone", old))
        tokens = PublishTokens(None, file)
        for times in (1, 2):
            file.rename(file.with_suffix(".away"))
            assert tokens.find(old) is not None
            assert tokens.find(old) is not None
            assert len(caplog.records) == times
            file.with_suffix(".away").rename(file)
            assert tokens.find(old) is not None
        write(file, line_for("ozone", new))
        assert tokens.find(old) is None


class TestMaking:
    def test_tokens_are_new_each_time_and_have_256_bits(self) -> None:
        made = {new_token() for _ in range(100)}
        assert len(made) == 100
        assert {len(token) for token in made} == {43}

    def test_a_line_holds_the_digest_and_not_the_token(self) -> None:
        digest = hashlib.sha256(b"secret").hexdigest()
        assert line_for("ozone", "secret") == f"ozone sha256:{digest} publish"
        assert line_for("ozone", "secret", [ADMIN, PUBLISH]).endswith(" publish,admin")
        assert line_for("ozone", "secret", []).endswith(" none")

    @pytest.mark.parametrize(
        "name", ["", " ", "a b", "a#b", "-a", "publish-token", "a\n", "n" * 65]
    )
    def test_a_name_that_the_file_could_not_hold_is_refused(self, file: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="NAME"):
            line_for(name, "secret")
        with pytest.raises(ConfigError, match="NAME"):
            add_token(file, name)
        assert not file.exists()

    def test_a_new_file_is_for_its_owner_alone(self, file: Path) -> None:
        token = add_token(file, "ozone")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.read_text() == line_for("ozone", token) + "\n"
        assert PublishTokens(None, file).find(token) is not None

    def test_lines_that_are_there_stay_also_without_a_line_end(self, file: Path) -> None:
        file.write_text("# ours\n" + line_for("one", "a"))
        token = add_token(file, "two", [ADMIN])
        assert file.read_text() == (
            "# ours\n" + line_for("one", "a") + "\n" + line_for("two", token, [ADMIN]) + "\n"
        )

    def test_a_name_that_exists_is_refused_and_the_file_left_alone(self, file: Path) -> None:
        add_token(file, "ozone")
        before = file.read_bytes()
        with pytest.raises(ConfigError, match="NAME: got 'ozone', expected a name that does not"):
            add_token(file, "ozone")
        assert file.read_bytes() == before

    def test_a_file_of_something_else_is_left_alone(self, file: Path) -> None:
        file.write_text("[server]\n")
        with pytest.raises(ConfigError, match="in line 1"):
            add_token(file, "ozone")
        assert file.read_text() == "[server]\n"

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"expected a file to write to \(No such file"):
            add_token(tmp_path / "no" / "tokens", "ozone")

    @pytest.mark.parametrize("written", ["nothing", "half"])
    def test_a_full_disk_leaves_the_file_as_it_was(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, written: str
    ) -> None:
        add_token(file, "one")
        before = file.read_bytes()
        original = os.write

        def write_some(descriptor: int, data: bytes) -> int:
            if written == "nothing":
                raise OSError(28, "No space left on device")
            return original(descriptor, data[:20])

        monkeypatch.setattr(os, "write", write_some)
        with pytest.raises(ConfigError, match="a file to write to"):
            add_token(file, "two")
        assert file.read_bytes() == before


class TestCommand:
    def test_the_token_is_printed_once_and_nothing_else_on_standard_output(
        self, file: Path
    ) -> None:
        from sse_labels.cli.token import token as command

        result = CliRunner().invoke(
            command, ["ozone", "--publish-tokens-file", str(file), "--rights", "publish,admin"]
        )
        assert result.exit_code == 0
        made = result.stdout.removesuffix("\n")
        holder = PublishTokens(None, file).find(made)
        assert holder == Holder("ozone", frozenset({PUBLISH, ADMIN}), digest_of(made))
        assert made not in result.stderr
        assert made not in file.read_text()

    @pytest.mark.parametrize("rights", ["", "write", "publish admin"])
    def test_wrong_rights_are_refused_before_anything_is_made(
        self, file: Path, rights: str
    ) -> None:
        from sse_labels.cli.token import token as command

        result = CliRunner().invoke(
            command, ["ozone", "--publish-tokens-file", str(file), "--rights", rights]
        )
        assert isinstance(result.exception, ConfigError)
        assert "--rights" in str(result.exception)
        assert not result.stdout
        assert not file.exists()

    def test_the_file_has_to_be_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sse_labels.cli.token import token as command

        monkeypatch.delenv("SSE_LABELS_PUBLISH_TOKENS_FILE", raising=False)
        result = CliRunner().invoke(command, ["ozone"])
        assert isinstance(result.exception, ConfigError)
        assert "--publish-tokens-file" in str(result.exception)
