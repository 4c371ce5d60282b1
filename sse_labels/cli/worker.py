"""The program of one worker; `serve --workers N` starts it N times.

Promises: only messages to the supervisor are written to standard output. Log lines name the worker.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial

from sse_labels.cli.signals import run_until_signal
from sse_labels.cli.standard_streams import guard
from sse_labels.errors import ConfigError, SseLabelsError
from sse_labels.logs import configure_logging
from sse_labels.workers.job import READY, TURNING, Job, encode_error
from sse_labels.workers.worker import serve


def main() -> int:
    """Read a job from standard input, do it, and return the exit status."""
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

    # A suspended supervisor reads nothing. A full pipe must not block the worker.
    os.set_blocking(supervisor, False)

    def send(line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(supervisor, line)

    async def ready(port: int) -> None:
        send(READY)

    try:
        run_until_signal(partial(serve, job, sys.stdin.fileno(), partial(send, TURNING)), ready)
    except SseLabelsError as error:
        send(encode_error(error))
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
