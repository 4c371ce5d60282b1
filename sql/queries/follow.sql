-- The sequencer follows the table with these blocks. The top of sql/migrations/0001_labels.sql
-- explains the settled rule, and sse_labels/feed/settled.py decides by it.

-- name: is_ozone
-- One row: whether this is Ozone's database; whether sse-labels made the label table.
SELECT to_regclass('label') IS NOT NULL
           AND to_regclass('moderation_event') IS NOT NULL
           AND to_regclass('signing_key') IS NOT NULL
           AND to_regclass('sse_labels_migration') IS NULL,
       to_regclass('sse_labels_migration') IS NOT NULL;

-- name: describe
-- One row: whether there is a label table; whether it has our own state; name and cache of the id
-- sequence; whether commit timestamps are kept; the server's version as a number; whether a unique
-- index gives each key (src, uri, cid, val) one row; whether this role may publish (label_publish
-- exists, and the role has all rights that it needs), delete old labels, begin a new epoch.
SELECT to_regclass('label') IS NOT NULL AS has_label,
       EXISTS (SELECT FROM pg_attribute
                WHERE attrelid = to_regclass('label_stream') AND attname = 'epoch') AS has_state,
       sequence.name,
       (SELECT seqcache FROM pg_sequence WHERE seqrelid = sequence.name::regclass) AS cache,
       current_setting('track_commit_timestamp') = 'on' AS has_commit_time,
       current_setting('server_version_num')::integer AS version,
       EXISTS (SELECT FROM pg_index
                WHERE indrelid = to_regclass('label') AND indisunique AND indisvalid
                  AND indpred IS NULL AND indexprs IS NULL AND indnatts = 4
                  AND (SELECT array_agg(attname::text ORDER BY attname) FROM pg_attribute
                        WHERE attrelid = indrelid AND attnum = ANY (indkey::smallint[]))
                      = ARRAY['cid', 'src', 'uri', 'val']) AS keys_are_unique,
       to_regproc('label_publish') IS NOT NULL
           AND has_table_privilege(to_regclass('label'), 'INSERT')
           AND has_sequence_privilege(sequence.name, 'USAGE')
           AND (SELECT bool_and(has_table_privilege(to_regclass('label_request'), needed))
                  FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed)
           IS TRUE AS may_publish,
       has_table_privilege(to_regclass('label_stream'), 'UPDATE')
           AND has_table_privilege(to_regclass('label'), 'DELETE')
           AND (SELECT bool_and(has_table_privilege(to_regclass('label_clock'), needed))
                  FROM unnest(ARRAY['SELECT', 'INSERT', 'DELETE']) AS needed)
           IS TRUE AS may_delete,
       has_table_privilege(to_regclass('label_stream'), 'UPDATE') IS TRUE AS may_claim
  FROM (SELECT CASE WHEN to_regclass('label') IS NOT NULL
                    THEN pg_get_serial_sequence('label', 'id') END AS name) AS sequence;

-- name: begin_session
-- One row: whether this server is a standby; the encoding of the database; whether triggers are off
-- and this role cannot turn them on. Sets what the connection's options cannot set: a setting that
-- PostgreSQL 13 does not know, one that only a superuser may set, and one that depends on its
-- earlier value. An idle session is not ended, because a session that listens is idle for long. A
-- commit waits for the disk, and a stricter value of the operator stays. Triggers fire. The options
-- are set here again, because a pooler that pools by session may have dropped them.
SELECT pg_is_in_recovery(), getdatabaseencoding(),
       current_setting('session_replication_role') = 'replica'
           AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
       (SELECT count(set_config(name, value, false))
          FROM (VALUES ('idle_session_timeout', '0', true),
                       ('synchronous_commit', 'local',
                        current_setting('synchronous_commit') = 'off'),
                       ('session_replication_role', 'origin',
                        (SELECT rolsuper FROM pg_roles WHERE rolname = current_user))
                 UNION ALL
                SELECT name, value, true
                  FROM unnest(%(names)s::text[], %(values)s::text[]) AS given (name, value))
               AS pinned (name, value, possible)
         WHERE possible AND current_setting(name, true) <> value);

-- name: newest
-- One row: the newest seq in the database, 0 when there never was one.
SELECT greatest(
         (SELECT max(id) FROM label),
         (SELECT CASE WHEN has_sequence_privilege(name, 'SELECT')
                      THEN pg_sequence_last_value(name) END
            FROM (SELECT pg_get_serial_sequence('label', 'id')::regclass::oid AS name) AS sequence),
         0);

-- name: rows_after
-- Rows (id, src, uri, cid, val, neg, cts, exp, sig) after a seq, by id. They may not be settled
-- yet. Backfills use this block too, and drop the rows after the head themselves: with `AND id <=
-- head` a planner without fresh statistics sorts the whole rest of the table for each page (40 ms,
-- not 2).
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM label
 WHERE id > %(cursor)s
 ORDER BY id
 LIMIT %(limit)s;

-- name: sequence_holders
-- Rows: the open virtual transactions that took an id, prepared ones included.
SELECT DISTINCT virtualtransaction
  FROM pg_locks
 WHERE locktype = 'relation'
   AND granted
   AND mode = 'RowExclusiveLock'
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND relation = pg_get_serial_sequence('label', 'id')::regclass;

-- name: commit_age
-- One row: the seconds since the label's transaction committed, by the database's clock.
SELECT extract(epoch FROM clock_timestamp() - pg_xact_commit_timestamp(xmin))::float8
  FROM label
 WHERE id = %(seq)s;

-- name: listen
-- Nothing; from now on notifications of new labels arrive on this connection.
LISTEN label_channel;

-- name: ping
-- One row: 1. The connection is alive.
SELECT 1;
