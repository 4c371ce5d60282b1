"""The command line: `sse-labels`.

Promises: an error is one line on standard error and an exit status. The status is 1 when something
failed, 2 when the request was wrong, and 130 after Ctrl-C. It is 141, without a line, when the
reader of standard output has gone (`| head`), as after a SIGPIPE. An error that a user can cause
shows no traceback.
Each command has a file of its own.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

import click

from sse_labels import __version__
from sse_labels.cli.standard_streams import OutputLost, guard
from sse_labels.errors import ConfigError, SseLabelsError

NAME = "sse-labels"
#: The commands in the order in which a new user needs them, and the module of each.
COMMANDS = {"demo": "demo", "serve": "serve", "migrate": "migrate", "publish": "publish",
            "token": "token", "tail": "tail", "verify": "verify", "mirror": "mirror",
            "doctor": "doctor", "reseed": "reseed"}  # fmt: skip

#: The exit status that a shell reports for a program that SIGPIPE has ended.
BROKEN_PIPE = 128 + signal.SIGPIPE


class Program(click.Group):
    """All commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; importing the server took half of a tail's start."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"{__name__}.{COMMANDS[cmd_name]}"), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101 - each module names it so
        return command


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="`sse-labels demo` serves made-up labels; it needs no database and no settings.",
)
@click.version_option(__version__, prog_name=NAME)
def cli() -> None:
    """Stream moderation labels out of PostgreSQL as Server-Sent Events.

    Without a DSN, `serve` runs a PostgreSQL of its own. Every option is also an
    environment variable: --poll-seconds is SSE_LABELS_POLL_SECONDS.
    """


def main() -> None:
    """Run the command line; the console script."""
    guard()
    try:
        status = cli.main(prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
    except OutputLost as error:
        status = BROKEN_PIPE if error.broken else 1
        if not error.broken:
            click.echo(f"{NAME}: {error}", err=True)
    except SseLabelsError as error:
        click.echo(f"{NAME}: {error}", err=True)
        status = 2 if isinstance(error, ConfigError) else 1
    except click.Abort:
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    sys.exit(status if isinstance(status, int) else 0)
