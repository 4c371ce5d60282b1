-- The table has the same columns as Ozone's, so that the same queries read both.
--
-- The settled rule, which every reader of this table follows: ids come from a sequence, and
-- transactions may commit in another order than they took their ids. So a reader that only asks for
-- `id > last` loses each label whose transaction commits late. nextval takes a RowExclusiveLock on
-- the sequence before it returns a number. The transaction holds the lock until it ends. When a
-- reader sees a hole, it notes the transactions that hold the lock then, waits until all of them
-- have ended, and reads again. The sequence's cache must be 1: with a larger cache a session uses
-- numbers that it took long ago.
CREATE TABLE label (
    id bigserial PRIMARY KEY,
    src varchar NOT NULL,
    uri varchar NOT NULL,
    cid varchar NOT NULL,
    val varchar NOT NULL,
    neg boolean,
    cts varchar NOT NULL,
    exp varchar,
    sig bytea,
    "signingKeyId" integer
);

-- For queryLabels: an exact URI or a prefix, then by seq. The index contains only the beginning of
-- the URI: an entry of a B-tree has at most 2,704 bytes, a URI 8,192. 600 characters of UTF-8
-- always fit.
CREATE INDEX label_uri_idx ON label ((left(uri, 600)) text_pattern_ops, id);

-- One row: the state that readers must know besides the labels.
CREATE TABLE label_stream (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    -- The oldest seq still kept. Retention raises the floor first, and then deletes.
    floor bigint NOT NULL DEFAULT 1 CHECK (floor >= 1)
);
INSERT INTO label_stream DEFAULT VALUES;

-- A hint to read the table: one notification for each statement, whatever number of rows it has.
CREATE FUNCTION label_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY label_channel;
    RETURN NULL;
END
$$;
CREATE TRIGGER label_notify AFTER INSERT ON label
    FOR EACH STATEMENT EXECUTE FUNCTION label_notify();

-- Append-only: a label that a consumer has read never changes.
CREATE FUNCTION label_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'label is append-only: % refused', TG_OP
        USING HINT = 'Insert a negation (neg = true) instead.';
END
$$;
CREATE TRIGGER label_refuse_change BEFORE UPDATE OR TRUNCATE ON label
    FOR EACH STATEMENT EXECUTE FUNCTION label_refuse_change();

-- Only labels below the floor may be deleted, so that no reader misses a label without notice.
CREATE FUNCTION label_refuse_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM gone WHERE id >= (SELECT floor FROM label_stream)) THEN
        RAISE EXCEPTION 'label is append-only: DELETE at or above the floor refused'
            USING HINT = 'Raise label_stream.floor first; readers are told by it.';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER label_refuse_delete AFTER DELETE ON label
    REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION label_refuse_delete();
