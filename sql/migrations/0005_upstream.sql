-- Other labelers that are mirrored here: how far their labels are stored. The cursor moves in the
-- transaction that stores the labels before it, or not at all.
CREATE TABLE label_upstream (
    -- Its subscribeLabels, without a cursor.
    url text NOT NULL,
    -- The one source whose labels are taken, or '' for all.
    source text NOT NULL,
    -- The last seq of the upstream's that was taken.
    cursor bigint NOT NULL,
    -- Which life of its database that belongs to, where it tells (sse-labels does).
    epoch text,
    -- It is read from its beginning once more: a label whose key has it as its newest is known.
    rewound boolean NOT NULL DEFAULT false,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (url, source)
);

-- What an upstream sent and a mirror did not store, so that nothing is lost.
CREATE TABLE label_set_aside (
    url text NOT NULL,
    seq bigint NOT NULL,
    -- Which label of the message, from 0.
    place integer NOT NULL,
    reason text NOT NULL,
    -- The label as it came, in DAG-CBOR.
    label bytea NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
