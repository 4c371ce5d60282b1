-- name: publish_labels
-- One row: the seqs of the labels, increasing; null when the key belongs to other labels.
SELECT label_publish(
    %(key)s::bytea, %(fingerprint)s::bytea,
    %(src)s::varchar[], %(uri)s::varchar[], %(cid)s::varchar[], %(val)s::varchar[],
    %(neg)s::boolean[], %(cts)s::varchar[], %(exp)s::varchar[], %(sig)s::bytea[]);

-- name: may_note_own_source
-- One row: whether this role may record a source as this database's own.
SELECT (has_table_privilege(to_regclass('label_own_source'), 'SELECT')
        AND has_table_privilege(to_regclass('label_own_source'), 'INSERT')) IS TRUE;

-- name: note_own_source
-- Nothing; from now on no mirror stores labels of this source. For published labels a trigger does
-- the same.
INSERT INTO label_own_source (src)
SELECT %(src)s::varchar
 WHERE NOT EXISTS (SELECT FROM label_own_source WHERE src = %(src)s::varchar);
