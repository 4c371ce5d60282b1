"""`sse-labels token NAME`: a new publish token.

Promises: the token is printed once, alone on standard output, after its digest is
in the file; the file itself is of no use to who wants to publish.
Does not belong here: the file's form, what a right opens (`publish_tokens`).
"""

from __future__ import annotations

from pathlib import Path

import click

from sse_labels.cli.layout import Command
from sse_labels.cli.options import option
from sse_labels.errors import ConfigError
from sse_labels.publishing.tokens import FILE_SETTING, PUBLISH, add_token, parse_rights
from sse_labels.setting_parsers import Expected, path
from sse_labels.watched_file import Unusable


def token_rights(text: str) -> frozenset[str]:
    """Read the rights of a token."""
    try:
        return parse_rights(text)
    except Unusable as error:
        raise Expected(str(error)) from None


@click.command(cls=Command, short_help="Make a publish token.")
@click.argument("name")
@option(
    "publish_tokens_file", path, "The server's file of publish tokens; made when there is none.",
)  # fmt: skip
@option(
    "rights", token_rights, "What it may do: publish, admin, both with a comma, or none.",
    default=PUBLISH,
)  # fmt: skip
def token(name: str, publish_tokens_file: Path | None, rights: frozenset[str]) -> None:
    """Make a publish token for NAME and print it, once.

    Its digest is added to the file, from which the server takes it at the next
    request. To take a token back, delete its line.
    """
    if publish_tokens_file is None:
        raise ConfigError(FILE_SETTING, None, "the server's file of publish tokens")

    click.echo(add_token(publish_tokens_file, name, rights))
    click.echo(f"{name} is in {publish_tokens_file}; the token above is kept nowhere", err=True)
