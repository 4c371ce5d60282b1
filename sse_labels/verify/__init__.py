"""Verification: reads a stream from its cursor to its head, and checks what the stream promises.

Promises: the outcome is a report for any input. A stream is called sound when no error was found.
The report names the parts that were not checked.
Does not belong here: options, signals, exit statuses (`cli.verify`).
"""

from sse_labels.verify.report import Report, Wanted
from sse_labels.verify.socket import SocketRun
from sse_labels.verify.stream import StreamRun

__all__ = ["Report", "SocketRun", "StreamRun", "Wanted"]
