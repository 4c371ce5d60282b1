-- name: state
-- One row: the floor; the epoch; the last known identity of the epoch, or null; the first label at
-- or above the floor, settled or not, or null.
SELECT floor, epoch::text, identity, (SELECT min(id) FROM label WHERE id >= floor)
  FROM label_stream;

-- name: identity
-- One row: cluster, database and timeline. Each changes when a database is rebuilt from a backup.
SELECT (SELECT system_identifier FROM pg_control_system()) || '/' ||
       (SELECT oid FROM pg_database WHERE datname = current_database()) || '/' ||
       (SELECT timeline_id FROM pg_control_checkpoint());

-- name: claim_identity
-- One row: the epoch, which is a new one when the identity has changed.
UPDATE label_stream
   SET epoch = CASE WHEN coalesce(identity, %(identity)s) = %(identity)s
                    THEN epoch ELSE gen_random_uuid() END,
       identity = %(identity)s
RETURNING epoch::text;

-- name: others_here
-- Rows (pid): this program's other sessions on this database. Every role can see application names.
-- A DSN may set another application name.
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND application_name IN ('sse-labels', current_setting('application_name'))
 ORDER BY pid;

-- name: reseed
-- One row: the last seq that is not used again, and the new epoch.
WITH moved AS (
    SELECT setval(pg_get_serial_sequence('label', 'id')::regclass,
                  greatest(%(above)s, (SELECT max(id) FROM label),
                           pg_sequence_last_value(pg_get_serial_sequence('label', 'id')::regclass),
                           1)) AS seq
), renewed AS (
    UPDATE label_stream SET epoch = gen_random_uuid() RETURNING epoch::text
)
SELECT seq, epoch FROM moved, renewed;
