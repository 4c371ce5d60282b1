-- The sources of this database's own: of whom labels were published here, or stored by SQL. A mirror
-- takes none of theirs from any upstream. `serve --signing-did` adds its own.
CREATE TABLE label_own_source (
    src varchar NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
-- Not unique: of two writers of a new source one would wait for the other's transaction to end.
CREATE INDEX label_own_source_idx ON label_own_source (src);

-- Of what was stored before this: all, when nothing was mirrored; else all but the sources that
-- upstreams are named for. When an upstream was taken whole, nobody can tell, and it is left empty.
INSERT INTO label_own_source (src)
SELECT DISTINCT src
  FROM label
 WHERE octet_length(src) <= 2048
   AND NOT EXISTS (SELECT FROM label_upstream WHERE source = '')
   AND src NOT IN (SELECT source FROM label_upstream);

-- As its owner, so that whoever may store labels needs no further right. What is longer than a DID
-- may be is none, and fits in no index.
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
    -- Nothing of the caller's may be found before it.
    EXECUTE format('ALTER FUNCTION label_note_source() SET search_path = pg_catalog, %I, pg_temp',
                   current_schema());
END
$$;
CREATE TRIGGER label_note_source AFTER INSERT ON label
    REFERENCING NEW TABLE AS made
    FOR EACH STATEMENT
    -- A mirror says of its session that it stores others' labels.
    WHEN (current_setting('sse_labels.mirror', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION label_note_source();
