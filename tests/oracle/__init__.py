"""An oracle: it says whether anything was lost, doubled, reordered or altered.

Promises: it shares no code with the service for parsing or ordering. It reads the wire with a
parser of its own, the table with psycopg2, and compares the two at the end, all of both.

    wire        HTTP/1.1 and event streams over raw sockets
    actors      who reads (consumers) and who writes (SQL writers, HTTP publishers)
    verdict     transcripts against the table, and the report
    proxy       a database connection that can be cut, refused or swallowed
    stage       PostgreSQL, proxy, program and oracle put together; the faults
    behind_nginx  the same with nginx before two servers

All chance comes from one seed, each actor's from a stream of its own: SSE_LABELS_TEST_SEED=<seed>
repeats who does what in which order, not the machine's timing.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

SEED_VARIABLE = "SSE_LABELS_TEST_SEED"


def choose_seed() -> str:
    """The seed that was asked for, else a new one."""
    return os.environ.get(SEED_VARIABLE) or str(random.SystemRandom().randrange(10**9))


def chance(seed: str, actor: str) -> random.Random:
    """The random numbers of one actor: another actor's number of draws changes none of them."""
    return random.Random(f"{seed}/{actor}")


def tell(config: Any, text: str) -> None:
    """Show `text` in pytest's output, past its capturing."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        # What a reporter writes in one of several processes (pytest-xdist) nobody sees.
        if hasattr(config, "workerinput"):
            sys.stderr.write(f"\n{text}\n")
            sys.stderr.flush()
        else:
            config.pluginmanager.getplugin("terminalreporter").write_line(f"\n{text}")
