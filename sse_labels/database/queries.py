"""Reads the SQL of this service from files: named blocks, and migrations.

Promises: every statement stands in `sql/` and is found by its name. No Python code builds SQL. The
wheel contains the files as `sse_labels/sql`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(
    r"^-- (?P<kind>name|fragment): (?P<name>\w+)\n(?P<returns>(-- .+\n)+)", re.MULTILINE
)
_USED = re.compile(r"\{(\w+)\}")
_MIGRATION = re.compile(r"^(?P<number>\d{4})_(?P<name>\w+)\.sql$")


class Migration(NamedTuple):
    """One step of the schema. Numbers start at 1 and have no gaps."""

    number: int
    name: str
    sql: str


def folder() -> Path:
    """Return the folder of the SQL files: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "sql"
    return installed if installed.is_dir() else package.parent / "sql"


@cache
def blocks() -> dict[str, str]:
    """Return all named blocks of `sql/queries/`: name to statement.

    A fragment is a part of blocks: its text replaces its name in braces.
    """
    found: dict[str, str] = {}
    fragments: dict[str, str] = {}
    for file in sorted((folder() / "queries").glob("*.sql")):
        text = file.read_text(encoding="utf-8")
        heads = list(_NAME.finditer(text))
        for head, following in zip(heads, [*heads[1:], None], strict=True):
            name = head["name"]
            if name in found or name in fragments:
                raise ValueError(f"{file.name}: the block {name} is defined twice")
            end = following.start() if following else len(text)
            into = found if head["kind"] == "name" else fragments
            into[name] = text[head.end() : end].strip().rstrip(";")

    def filled(text: str) -> str:
        return _USED.sub(lambda used: filled(fragments[used[1]]), text)

    return {name: filled(text) for name, text in found.items()}


def block(name: str) -> str:
    """Return one statement. An unknown name raises KeyError."""
    return blocks()[name]


@cache
def migrations() -> tuple[Migration, ...]:
    """Return all migrations in order."""
    found = []
    for file in sorted((folder() / "migrations").glob("*.sql")):
        match = _MIGRATION.match(file.name)
        if match is None:
            raise ValueError(f"{file.name}: a migration is named NNNN_name.sql")
        sql = file.read_text(encoding="utf-8")
        found.append(Migration(int(match["number"]), match["name"], sql))
    if [step.number for step in found] != list(range(1, len(found) + 1)):
        raise ValueError("migrations must be numbered from 1 without a gap")
    return tuple(found)
