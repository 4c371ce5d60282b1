"""The command line: `sse-labels`.

Promises: what goes wrong is one line on standard error that names it, and an
exit status: 1 when something failed, 2 when it was asked for wrongly, 130 after
Ctrl-C. No traceback for what a user can cause.
Stands above everything.
Does not belong here: what the commands do; each has a file of its own.
"""

from __future__ import annotations

import os
import sys

import click

from sse_labels import __version__
from sse_labels.cli.demo import demo
from sse_labels.cli.publish import publish
from sse_labels.cli.serve import migrate, serve
from sse_labels.cli.tail import tail
from sse_labels.errors import ConfigError, SseLabelsError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sse-labels")
def cli() -> None:
    """Stream moderation labels out of PostgreSQL as Server-Sent Events.

    Without a DSN a PostgreSQL of its own is run in the data directory.
    """


for command in (serve, demo, migrate, publish, tail):
    cli.add_command(command)


def main() -> None:
    """Run the command line; the console script."""
    try:
        status = cli.main(standalone_mode=False)
    except SseLabelsError as error:
        click.echo(f"sse-labels: {error}", err=True)
        status = 2 if isinstance(error, ConfigError) else 1
    except click.Abort:
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). Nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status if isinstance(status, int) else 0)
