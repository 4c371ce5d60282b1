-- The table is Ozone's, column for column, so that the same queries read either.
--
-- What is settled (the rule that everything which reads this table follows):
-- ids come from a sequence, and transactions commit in another order than they
-- took their ids. `id > last` therefore loses each label whose transaction
-- commits late. nextval takes a RowExclusiveLock on the sequence before it hands
-- out a number and holds it until the transaction ends; so when a hole shows,
-- wait until every transaction that holds that lock right after the hole was
-- seen has ended, and read again. The sequence's cache must be 1: with a larger
-- one a session hands out numbers it took long ago.
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

-- For queryLabels: an exact URI or a prefix, then by seq. Only the beginning of the
-- URI: an entry of a B-tree holds 2,704 bytes at most, a URI 8,192; 600 characters
-- of UTF-8 always fit.
CREATE INDEX label_uri_idx ON label ((left(uri, 600)) text_pattern_ops, id);

-- One row: what readers must know beside the labels.
CREATE TABLE label_stream (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    -- The oldest seq still kept. Retention raises it first and deletes then.
    floor bigint NOT NULL DEFAULT 1 CHECK (floor >= 1)
);
INSERT INTO label_stream DEFAULT VALUES;

-- A hint, once per statement however many rows it brings: look at the table.
CREATE FUNCTION label_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY label_channel;
    RETURN NULL;
END
$$;
CREATE TRIGGER label_notify AFTER INSERT ON label
    FOR EACH STATEMENT EXECUTE FUNCTION label_notify();

-- Append-only: what a consumer has read never changes behind it.
CREATE FUNCTION label_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'label is append-only: % refused', TG_OP
        USING HINT = 'Insert a negation (neg = true) instead.';
END
$$;
CREATE TRIGGER label_refuse_change BEFORE UPDATE OR TRUNCATE ON label
    FOR EACH STATEMENT EXECUTE FUNCTION label_refuse_change();

-- Only what lies below the floor may be deleted, so that no reader is skipped over silently.
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
