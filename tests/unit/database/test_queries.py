"""The SQL files: each block says what it returns, has one name, and is called by somebody."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sse_labels
from sse_labels.database import queries
from sse_labels.database.queries import block, blocks, folder, migrations

QUERY_FILES = sorted((folder() / "queries").glob("*.sql"))


@pytest.fixture
def sql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for the SQL, empty."""
    (tmp_path / "queries").mkdir()
    (tmp_path / "migrations").mkdir()
    monkeypatch.setattr(queries, "folder", lambda: tmp_path)
    blocks.cache_clear()
    migrations.cache_clear()
    yield tmp_path
    blocks.cache_clear()
    migrations.cache_clear()


class TestReading:
    def test_a_block_is_its_statement_without_the_comment_and_the_semicolon(
        self, sql: Path
    ) -> None:
        (sql / "queries" / "a.sql").write_text(
            "-- A file about something.\n\n"
            "-- name: first\n-- One row: 1.\nSELECT 1;\n\n"
            "-- name: second\n-- Rows (a),\n-- by a.\nSELECT a\n  FROM b;\n"
        )
        assert blocks() == {"first": "SELECT 1", "second": "SELECT a\n  FROM b"}

    def test_a_fragment_stands_in_the_blocks_that_name_it_and_is_none(self, sql: Path) -> None:
        (sql / "queries" / "a.sql").write_text(
            "-- name: first\n-- One row: 3.\nSELECT {sum};\n\n"
            "-- fragment: sum\n-- Three.\n1 + {two};\n"
        )
        (sql / "queries" / "b.sql").write_text("-- fragment: two\n-- Two.\n(1 + 1);\n")
        assert blocks() == {"first": "SELECT 1 + (1 + 1)"}

    def test_a_fragment_that_does_not_exist_is_a_key_error(self, sql: Path) -> None:
        (sql / "queries" / "a.sql").write_text("-- name: first\n-- One row.\nSELECT {sum};\n")
        with pytest.raises(KeyError, match="sum"):
            blocks()

    def test_a_name_that_does_not_exist_is_a_key_error(self) -> None:
        with pytest.raises(KeyError):
            block("no_such_block")

    @pytest.mark.parametrize("other", ["a.sql", "b.sql"])
    def test_a_name_that_is_given_twice_is_refused(self, sql: Path, other: str) -> None:
        text = "-- name: same\n-- One row: 1.\nSELECT 1;\n"
        (sql / "queries" / "a.sql").write_text(text)
        with (sql / "queries" / other).open("a") as file:
            file.write("\n" + text)
        with pytest.raises(ValueError, match=f"{other}: the block same is defined twice"):
            blocks()

    def test_migrations_come_in_the_order_of_their_numbers(self, sql: Path) -> None:
        for name in ("0002_more.sql", "0001_first.sql", "0003_last.sql"):
            (sql / "migrations" / name).write_text(f"-- {name}")
        assert [(step.number, step.name, step.sql) for step in migrations()] == [
            (1, "first", "-- 0001_first.sql"),
            (2, "more", "-- 0002_more.sql"),
            (3, "last", "-- 0003_last.sql"),
        ]

    @pytest.mark.parametrize(
        "names", [["0002_first.sql"], ["0001_a.sql", "0003_b.sql"], ["0001_a.sql", "0001_b.sql"]]
    )
    def test_migrations_with_a_gap_or_a_twin_are_refused(self, sql: Path, names: list[str]) -> None:
        for name in names:
            (sql / "migrations" / name).write_text("")
        with pytest.raises(ValueError, match="without a gap"):
            migrations()

    @pytest.mark.parametrize("name", ["1_a.sql", "0001.sql", "0001-a.sql", "first.sql"])
    def test_a_migration_under_another_kind_of_name_is_refused(self, sql: Path, name: str) -> None:
        (sql / "migrations" / name).write_text("")
        with pytest.raises(ValueError, match="NNNN_name"):
            migrations()


class TestTheFiles:
    def test_there_are_blocks_and_migrations(self) -> None:
        assert QUERY_FILES
        assert blocks()
        assert [step.number for step in migrations()] == list(range(1, len(migrations()) + 1))

    @pytest.mark.parametrize("file", QUERY_FILES, ids=lambda file: file.name)
    def test_every_block_has_a_line_that_says_what_it_returns(self, file: Path) -> None:
        lines = file.read_text(encoding="utf-8").splitlines()
        heads = [number for number, line in enumerate(lines) if re.match(r"--\s*name\b", line)]
        assert heads
        for number in heads:
            name = lines[number].removeprefix("-- name: ")
            # A head that is written otherwise would be no block, and nobody would notice.
            assert name in blocks(), lines[number]
            returns = lines[number + 1]
            assert returns.startswith("-- "), name
            assert len(returns) > 10, name

    def test_names_are_unique_over_all_files(self) -> None:
        names = [
            name
            for file in QUERY_FILES
            for name in re.findall(r"^-- name: (\w+)$", file.read_text(encoding="utf-8"), re.M)
        ]
        assert sorted(names) == sorted(set(names))
        assert set(names) == set(blocks())

    def test_every_block_has_a_caller_and_every_call_a_block(self) -> None:
        assert called_blocks() == set(blocks())

    @pytest.mark.parametrize("name", sorted(blocks()))
    def test_a_block_is_one_statement_with_named_parameters(self, name: str) -> None:
        statement = block(name)
        assert ";" not in statement
        assert not statement.endswith("\n")
        without_named = re.sub(r"%\(\w+\)s", "", statement)
        # A lone percent sign is an error in the driver once there are parameters.
        assert "%" not in without_named.replace("%%", "")
        if without_named == statement:
            assert "%%" not in statement, "without parameters the driver leaves it doubled"

    def test_no_python_file_holds_sql(self) -> None:
        verbs = re.compile(r"^\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|LISTEN)\s", re.M)
        for file in Path(sse_labels.__file__).parent.rglob("*.py"):
            for text in _texts(file):
                assert not verbs.search(text), f"{file.name}: {text}"


def called_blocks() -> set[str]:
    """The names given to `fetch` and `block` anywhere in the package."""
    names = set()
    for file in Path(sse_labels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="fetch") | ast.Name(id="block"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    names.add(name)
    return names


def _texts(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Constant(value=str(text)):
                yield text
