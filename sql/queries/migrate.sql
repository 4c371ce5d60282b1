-- name: lock_schema
-- Nothing; waits until no other server migrates.
SELECT pg_advisory_lock(hashtext('sse-labels'));

-- name: schema_exists
-- One row: whether there is a record of our migrations; whether there is a label table.
SELECT to_regclass('sse_labels_migration') IS NOT NULL, to_regclass('label') IS NOT NULL;

-- name: schema_version
-- One row: the newest applied migration, 0 when there is none.
SELECT coalesce(max(number), 0) FROM sse_labels_migration;

-- name: create_schema_record
-- Nothing; creates the record of our migrations.
CREATE TABLE sse_labels_migration (
    number integer PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: record_migration
-- Nothing; records one migration, in the transaction that applies it.
INSERT INTO sse_labels_migration (number, name) VALUES (%(number)s, %(name)s);
