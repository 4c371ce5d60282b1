"""`sse-labels token NAME`: makes a publish token.

Promises: the digest of the token is stored in the file first. Then the token is printed once, alone
on standard output. With the file alone nobody can publish. `publishing.tokens` knows the file's
format.
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
    "publish_tokens_file", path, "The server's file of publish tokens; made when it is missing.",
)  # fmt: skip
@option(
    "rights", token_rights, "Rights of the token: publish, admin, both with a comma, or none.",
    default=PUBLISH,
)  # fmt: skip
def token(name: str, publish_tokens_file: Path | None, rights: frozenset[str]) -> None:
    """Make a publish token for NAME and print it once.

    The digest of the token is added to the file. The server reads the file at the
    next request. To revoke a token, delete its line.
    """
    if publish_tokens_file is None:
        raise ConfigError(FILE_SETTING, None, "the server's file of publish tokens")

    click.echo(add_token(publish_tokens_file, name, rights))
    click.echo(f"{name} is in {publish_tokens_file}; the token above is not stored", err=True)
