"""What `serve --workers N` starts N times: no command for people.

Promises: standard output belongs to the supervisor; log lines name the worker.
Does not belong here: what a worker does (`workers`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial

from sse_labels.cli.signals import until_told
from sse_labels.cli.standard_streams import guard
from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.logs import configure_logging
from sse_labels.workers.job import READY, TURNING, Job, encode_error
from sse_labels.workers.worker import serve


def main() -> int:
    """Do the job that standard input brings; return the exit status."""
    guard()
    job = Job.read(sys.stdin.buffer)
    if job is None:
        return 0
    supervisor = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings = job.settings
    configure_logging(
        settings.log_level, settings.log_format, job.name, settings.log_lines_per_address
    )

    # A supervisor that is stopped reads nothing: that is not to stop us, once the pipe is full.
    os.set_blocking(supervisor, False)

    def tell(line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(supervisor, line)

    async def ready(port: int) -> None:
        tell(READY)

    try:
        until_told(partial(serve, job, sys.stdin.fileno(), partial(tell, TURNING)), ready)
    except SseLabelsError as error:
        tell(encode_error(error))
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
