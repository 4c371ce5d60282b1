"""A real PgBouncer; with pooling by transaction, LISTEN does not work behind it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from support.program import PATIENCE_SECONDS, free_port
from support.system import program

CONFIGURATION = """
[databases]
* = user={user} host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = any
pool_mode = {pool_mode}
logfile = {log}
ignore_startup_parameters = options,extra_float_digits
"""


@contextmanager
def pgbouncer(dsn: str, pool_mode: str = "transaction") -> Iterator[str]:
    """Run it before the database at `dsn`; yield the DSN through it."""
    path = program("pgbouncer")
    parts = parse_dsn(dsn)
    # Neither PgBouncer nor PostgreSQL runs as root. Only the socket's owner can enter its folder.
    owner = Path(parts["host"]).stat()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sse-labels-pgbouncer-") as directory:
        os.chown(directory, owner.st_uid, owner.st_gid)
        file, errors = Path(directory, "pgbouncer.ini"), Path(directory, "log")
        file.write_text(
            CONFIGURATION.format(
                user=parts["user"],
                host=parts["host"],
                port=parts["port"],
                own_port=port,
                pool_mode=pool_mode,
                log=errors,
            )
        )
        file.chmod(0o644)
        process = subprocess.Popen(
            [path, str(file)],
            user=owner.st_uid, group=owner.st_gid, extra_groups=[] if os.getuid() == 0 else None,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        through = make_dsn(dsn, host="127.0.0.1", port=port)
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                try:
                    psycopg2.connect(through).close()
                    break
                except psycopg2.OperationalError:
                    running = process.poll() is None and time.monotonic() < deadline
                    assert running, errors.read_text()
                    time.sleep(0.02)
            yield through
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
