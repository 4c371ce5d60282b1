-- name: lock_schema
-- Nothing; one server at a time migrates. The key is 'sse-labels' by hashtext.
SELECT pg_advisory_lock(hashtext('sse-labels'));

-- name: schema_exists
-- One row: is there a record of our migrations; is there a label table.
SELECT to_regclass('sse_labels_migration') IS NOT NULL, to_regclass('label') IS NOT NULL;

-- name: schema_version
-- One row: the newest migration that was applied, 0 when none was.
SELECT coalesce(max(number), 0) FROM sse_labels_migration;

-- name: create_schema_record
-- Nothing; the record of our migrations.
CREATE TABLE sse_labels_migration (
    number integer PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: record_migration
-- Nothing; remembers one migration, in the transaction that applied it.
INSERT INTO sse_labels_migration (number, name) VALUES (%(number)s, %(name)s);
