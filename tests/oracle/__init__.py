"""The oracle: it decides whether a label was lost, doubled, reordered or altered.

Promises: it shares no code with the service for parsing or ordering. It reads the wire with its own
parser and the table with psycopg2. At the end it compares every event with every row.

    wire          HTTP/1.1 and event streams over raw sockets
    consumers     readers of the stream; sockets: readers by WebSocket
    writers       SQL writers and HTTP publishers
    verdict       compares transcripts with the table; the report
    proxy         a database connection that can be cut, refused or swallowed
    databases     PostgreSQL and a database for each run
    hooks         code in the program's process, by which tests cause errors
    stage         PostgreSQL, proxy, program, consumers and writers of one run
    faults        the faults that can happen to a stage
    behind_nginx  a stage with nginx before two servers

All random numbers come from one seed; each actor has its own generator. SSE_LABELS_TEST_SEED=<seed>
repeats the actions of each actor in their order. It does not repeat the machine's timing.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

SEED_VARIABLE = "SSE_LABELS_TEST_SEED"


def choose_seed() -> str:
    """The seed of the environment variable, else a new one."""
    return os.environ.get(SEED_VARIABLE) or str(random.SystemRandom().randrange(10**9))


def chance(seed: str, actor: str) -> random.Random:
    """The random numbers of one actor; they do not depend on other actors' draws."""
    return random.Random(f"{seed}/{actor}")


def tell(config: Any, text: str) -> None:
    """Show `text` in pytest's output, past its capturing."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        # In a process of pytest-xdist the output of the terminal reporter is not shown.
        if hasattr(config, "workerinput"):
            sys.stderr.write(f"\n{text}\n")
            sys.stderr.flush()
        else:
            config.pluginmanager.getplugin("terminalreporter").write_line(f"\n{text}")
