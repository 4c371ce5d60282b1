-- name: publish_labels
-- One row: the seqs of the labels, increasing; null when the key belongs to other labels.
SELECT label_publish(
    %(key)s::bytea, %(fingerprint)s::bytea,
    %(src)s::varchar[], %(uri)s::varchar[], %(cid)s::varchar[], %(val)s::varchar[],
    %(neg)s::boolean[], %(cts)s::varchar[], %(exp)s::varchar[], %(sig)s::bytea[]);
