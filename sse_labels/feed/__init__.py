"""The corridor: from the label table to one consumer. Read this first.

    label row ──> store ──> sequencer ──> outbox
     (table)     rows to    one per      one per
                 chunks     process      connection

A good order to read the files:

1. `settled`: which rows may be streamed. `chunk`, `ring`: who owns which bytes.
2. `store`: each read of the labels. `listener`, `sequencer`: follow the table, once per process.
3. `reads`, `pages`: reads of history, shared by all connections.
4. `steps`, `backfill`, `chunk_queue`, `outbox`: one connection, from its cursor to live.
5. `retention`, `snapshots`, and `feed`, which creates and connects all of them.

No module here handles a socket or a header. SQL stands in named blocks in `sql/queries/`.
"""
