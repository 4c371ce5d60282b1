"""Verification: a stream is read from end to end, and what it promises is checked.

Promises: whatever a server sends, the outcome is a report; a stream is called sound when nothing
was found wrong, and what was not looked at is said.
Stands outside the corridor: a reader like any other.
Does not belong here: options, signals, exit statuses (`cli.verify`).
"""

from sse_labels.verify.report import Report, Wanted
from sse_labels.verify.socket import SocketRun
from sse_labels.verify.stream import StreamRun

__all__ = ["Report", "SocketRun", "StreamRun", "Wanted"]
