"""What a server sets for its own process: descriptors, garbage collection."""

from __future__ import annotations

import gc
import resource

#: The collector was a third of the cost of accepting connections with CPython's defaults.
GC_THRESHOLD = (100_000, 50, 100)


def tune_process() -> None:
    """Raise the limit of open files to what is allowed, and calm the garbage collector."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.set_threshold(*GC_THRESHOLD)
    gc.collect()
    gc.freeze()
