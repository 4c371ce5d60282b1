-- The database's own sources: their labels were published here, or stored by SQL. A mirror stores
-- no labels of these sources from an upstream. `serve --signing-did` adds its DID.
CREATE TABLE label_own_source (
    src varchar NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
-- Not unique: otherwise one of two writers of a new source would wait for the other's transaction.
CREATE INDEX label_own_source_idx ON label_own_source (src);

-- The sources of labels that were stored before this migration. Without a mirror, all of them are
-- own sources. With mirrors of single sources, all other sources are own sources. If an upstream
-- was mirrored with all its sources, own sources are unknown, and the table stays empty.
INSERT INTO label_own_source (src)
SELECT DISTINCT src
  FROM label
 WHERE octet_length(src) <= 2048
   AND NOT EXISTS (SELECT FROM label_upstream WHERE source = '')
   AND src NOT IN (SELECT source FROM label_upstream);

-- Runs as its owner, so that a role that may store labels needs no other right. A text longer than
-- the limit of a DID is not a DID, and does not fit into the index.
CREATE FUNCTION label_note_source() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO label_own_source (src)
    SELECT DISTINCT src
      FROM made
     WHERE octet_length(src) <= 2048
       AND NOT EXISTS (SELECT FROM label_own_source AS own WHERE own.src = made.src);
    RETURN NULL;
END
$$;
DO $$
BEGIN
    -- The function must not find objects of the caller first.
    EXECUTE format('ALTER FUNCTION label_note_source() SET search_path = pg_catalog, %I, pg_temp',
                   current_schema());
END
$$;
CREATE TRIGGER label_note_source AFTER INSERT ON label
    REFERENCING NEW TABLE AS made
    FOR EACH STATEMENT
    -- A mirror sets this in its session, because it stores labels of other sources.
    WHEN (current_setting('sse_labels.mirror', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION label_note_source();
