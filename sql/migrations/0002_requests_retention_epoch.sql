-- The results of requests with an Idempotency-Key, so that a repeated request stores no label
-- twice.
CREATE TABLE label_request (
    -- SHA-256 over the publisher and the key.
    key bytea PRIMARY KEY,
    -- SHA-256 over the labels: the same key with other labels is refused.
    fingerprint bytea NOT NULL,
    seqs bigint[] NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX label_request_at_idx ON label_request (at);

-- Stores all labels and returns their seqs. If an earlier request had the same key, nothing is
-- stored: returns the seqs of that request, or null when that request had other labels. One
-- statement is one transaction: if the connection is lost before the answer, all labels are stored
-- or none.
CREATE FUNCTION label_publish(
    given_key bytea, given_fingerprint bytea,
    given_src varchar[], given_uri varchar[], given_cid varchar[], given_val varchar[],
    given_neg boolean[], given_cts varchar[], given_exp varchar[], given_sig bytea[]
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    earlier label_request;
    made bigint[];
BEGIN
    IF given_key IS NOT NULL THEN
        -- Waits for a running request with the same key, before an id is taken.
        INSERT INTO label_request (key, fingerprint, seqs)
            VALUES (given_key, given_fingerprint, '{}') ON CONFLICT (key) DO NOTHING;
        IF NOT FOUND THEN
            SELECT * INTO STRICT earlier FROM label_request WHERE key = given_key;
            RETURN CASE WHEN earlier.fingerprint = given_fingerprint THEN earlier.seqs END;
        END IF;
    END IF;
    WITH stored AS (
        INSERT INTO label (src, uri, cid, val, neg, cts, exp, sig)
        SELECT given.src, given.uri, given.cid, given.val, given.neg, given.cts, given.exp, given.sig
          FROM unnest(given_src, given_uri, given_cid, given_val, given_neg, given_cts, given_exp,
                      given_sig)
               WITH ORDINALITY AS given (src, uri, cid, val, neg, cts, exp, sig, place)
         ORDER BY given.place
        RETURNING id
    )
    SELECT coalesce(array_agg(id ORDER BY id), '{}') INTO made FROM stored;
    IF given_key IS NOT NULL THEN
        UPDATE label_request SET seqs = made WHERE key = given_key;
    END IF;
    RETURN made;
END
$$;

-- Seqs of one epoch belong together. A database that was rebuilt from a backup gets another epoch.
ALTER TABLE label_stream
    ADD COLUMN epoch uuid NOT NULL DEFAULT gen_random_uuid(),
    -- The cluster, database and timeline of this epoch, as a server last saw them.
    ADD COLUMN identity text;

-- The newest seq at several times: for retention by age, without another column in label.
CREATE TABLE label_clock (
    seq bigint PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX label_clock_at_idx ON label_clock (at);
