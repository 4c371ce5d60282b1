-- The labelers that are mirrored here, and up to which seq their labels are stored. The cursor
-- moves only in the transaction that stores the labels before it.
CREATE TABLE label_upstream (
    -- The URL of the upstream's subscribeLabels, without a cursor.
    url text NOT NULL,
    -- The source whose labels are stored, or '' for all sources.
    source text NOT NULL,
    -- The upstream's last seq that was processed.
    cursor bigint NOT NULL,
    -- The epoch of the cursor, if the upstream sends its epoch (sse-labels does).
    epoch text,
    -- The upstream is read from its beginning again: the newest label of a key is not stored twice.
    rewound boolean NOT NULL DEFAULT false,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (url, source)
);

-- Labels that an upstream sent and a mirror did not store, so that no label is lost.
CREATE TABLE label_set_aside (
    url text NOT NULL,
    seq bigint NOT NULL,
    -- The label's place in the message, from 0.
    place integer NOT NULL,
    reason text NOT NULL,
    -- The label as the upstream sent it, in DAG-CBOR.
    label bytea NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
