"""The layout of `--help`: options in groups, each with its environment variable.

Promises: every option is shown with its environment variable and its default, within 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import click
from click.formatting import wrap_text

#: The column of the environment variables, in characters from the left.
ENV_COLUMN = 38
#: The group of options that have no group of their own.
OTHER = "Other options"


class Option(click.Option):
    """An option that is also an environment variable. Its value is a text; the caller checks it."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        env: str,
        shown_default: str | None,
        group: str | None,
        metavar: str | None = None,
        **more: Any,
    ) -> None:
        # `--poll-seconds` takes SECONDS.
        super().__init__(names, metavar=metavar or env.rpartition("_")[2], **more)
        self.env = env
        self.shown_default = shown_default
        self.group = group

    def write(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the option and its variable on one line, and its help below."""
        record = super().get_help_record(ctx)
        assert record is not None  # noqa: S101 - no option here is hidden
        names, text = record
        indent = formatter.current_indent
        formatter.write(f"{'':>{indent}}{names:<{ENV_COLUMN - indent - 2}}  {self.env}\n")
        indent += 4
        default = "" if self.shown_default is None else f"[default: {self.shown_default}]"
        if indent + len(text) + 2 + len(default) <= formatter.width:
            formatter.write(f"{'':>{indent}}{text}  {default}".rstrip() + "\n")
            return
        # The default is not broken over lines, so that a search finds it.
        formatter.write(wrap_text(text, formatter.width, " " * indent, " " * indent) + "\n")
        formatter.write(f"{'':>{indent}}{default}\n")


class Command(click.Command):
    """A command whose options are shown in groups, in the order of the groups' first options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups, then --help."""
        options = [param for param in self.get_params(ctx) if isinstance(param, Option)]
        order = {option.group: place for place, option in reversed([*enumerate(options)])}
        options.sort(key=lambda option: order[option.group])
        for group, members in groupby(options, key=lambda option: option.group):
            with formatter.section(group or OTHER if len(order) > 1 else "Options"):
                for option in members:
                    option.write(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(
            "On the right of each option is the environment variable that sets it too. The option "
            "wins. An empty variable counts as not set. -h, --help shows this text."
        )
