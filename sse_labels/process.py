"""Sets limits of the server's own process: descriptors, garbage collection."""

from __future__ import annotations

import gc
import resource

#: With CPython's defaults, the collector took a third of the time of accepting connections.
GC_THRESHOLD = (100_000, 50, 100)


def tune_process() -> None:
    """Raise the limit of open files to the allowed maximum. Make the garbage collector run less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.set_threshold(*GC_THRESHOLD)
    gc.collect()
    gc.freeze()
