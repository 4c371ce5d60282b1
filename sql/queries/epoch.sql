-- name: state
-- One row: the floor; the epoch; the identity it was last seen in, or null; the first label at or
-- above the floor, settled or not, or null.
SELECT floor, epoch::text, identity, (SELECT min(id) FROM label WHERE id >= floor)
  FROM label_stream;

-- name: identity
-- One row: cluster, database and timeline. Each changes when a database is rebuilt from a backup.
SELECT (SELECT system_identifier FROM pg_control_system()) || '/' ||
       (SELECT oid FROM pg_database WHERE datname = current_database()) || '/' ||
       (SELECT timeline_id FROM pg_control_checkpoint());

-- name: claim_identity
-- One row: the epoch, a new one when the identity is not the one it was last seen in.
UPDATE label_stream
   SET epoch = CASE WHEN coalesce(identity, %(identity)s) = %(identity)s
                    THEN epoch ELSE gen_random_uuid() END,
       identity = %(identity)s
RETURNING epoch::text;

-- name: reseed
-- One row: the last seq that will not be used, and the new epoch.
WITH moved AS (
    SELECT setval(pg_get_serial_sequence('label', 'id')::regclass,
                  greatest(%(above)s, (SELECT max(id) FROM label),
                           pg_sequence_last_value(pg_get_serial_sequence('label', 'id')::regclass),
                           1)) AS seq
), renewed AS (
    UPDATE label_stream SET epoch = gen_random_uuid() RETURNING epoch::text
)
SELECT seq, epoch FROM moved, renewed;
