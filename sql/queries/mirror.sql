-- The blocks of a mirror of other labelers. One session has the lock of an upstream, and runs all
-- of the upstream's blocks.

-- name: may_mirror
-- One row: whether this role may store labels and the state of an upstream.
SELECT bool_and(has_table_privilege(to_regclass(place), needed) IS TRUE)
           AND has_sequence_privilege(pg_get_serial_sequence('label', 'id'), 'USAGE')
  FROM (VALUES ('label', 'SELECT'), ('label', 'INSERT'), ('label_set_aside', 'SELECT'),
               ('label_set_aside', 'INSERT'), ('label_set_aside', 'DELETE'),
               ('label_upstream', 'SELECT'), ('label_upstream', 'INSERT'),
               ('label_upstream', 'UPDATE'), ('label_own_source', 'SELECT')) AS wanted (place, needed);

-- name: own_sources
-- Rows (source): those of the given sources that are this database's own.
SELECT DISTINCT src FROM label_own_source WHERE src = ANY (%(sources)s::varchar[]);

-- name: store_as_mirror
-- One row without use; labels that this session stores do not make their source an own source.
SELECT set_config('sse_labels.mirror', 'on', false);

-- name: lock_upstream
-- One row: whether this session now has the lock of this upstream.
SELECT pg_try_advisory_lock(hashtext('sse-labels mirror'), hashtext(%(source)s || ' ' || %(url)s));

-- name: register_upstream
-- Nothing; a known upstream keeps its cursor. If the upstream was mirrored for another source or
-- for all sources, some of its labels may be stored already.
INSERT INTO label_upstream (url, source, cursor, rewound)
SELECT %(url)s, %(source)s, %(cursor)s, EXISTS (SELECT FROM label_upstream WHERE url = %(url)s)
    ON CONFLICT DO NOTHING;

-- name: upstream
-- One row: the upstream's last processed seq; its epoch, or null.
SELECT cursor, epoch FROM label_upstream WHERE url = %(url)s AND source = %(source)s;

-- name: note_upstream_epoch
-- Nothing; records the epoch of the cursor.
UPDATE label_upstream SET epoch = %(epoch)s
 WHERE url = %(url)s AND source = %(source)s AND epoch IS NULL;

-- name: rewind_upstream
-- Nothing; from now on the upstream is read from its beginning.
UPDATE label_upstream SET cursor = 0, epoch = NULL, rewound = true
 WHERE url = %(url)s AND source = %(source)s;

-- name: store_mirrored
-- One row: whether the cursor was the expected one (otherwise nothing is stored); the number of
-- stored labels; the number of labels left out because their source is this database's own. One
-- statement is one transaction: if the connection is lost before the answer, all is stored or
-- nothing. After a rewind, a label is not stored again when it equals the newest label of its key:
-- the newest before it in this batch, or else in the table. So the same labels are in force here
-- and at the upstream, even if the upstream has deleted old labels.
WITH moved AS (
    UPDATE label_upstream
       SET cursor = %(until)s, at = clock_timestamp(), set_aside = set_aside + %(aside_count)s
     WHERE url = %(url)s AND source = %(source)s AND cursor = %(cursor)s
    RETURNING rewound
), given AS (
    SELECT each.*,
           CASE WHEN rewound
                THEN coalesce(
                         lag(ROW (each.neg, each.cts, each.exp, each.sig))
                             OVER (PARTITION BY each.src, each.uri, each.cid, each.val
                                       ORDER BY each.place),
                         (SELECT ROW (label.neg, label.cts, label.exp, label.sig)
                            FROM label
                           WHERE hashtextextended(label.src || ' ' || label.uri || ' '
                                                  || label.cid || ' ' || label.val, 0)
                                 = hashtextextended(each.src || ' ' || each.uri || ' '
                                                    || each.cid || ' ' || each.val, 0)
                             AND label.src = each.src AND label.uri = each.uri
                             AND label.cid = each.cid AND label.val = each.val
                           ORDER BY label.id DESC
                           LIMIT 1))
           END AS newest
      FROM moved,
           unnest(%(src)s::varchar[], %(uri)s::varchar[], %(cid)s::varchar[], %(val)s::varchar[],
                  %(neg)s::boolean[], %(cts)s::varchar[], %(exp)s::varchar[], %(sig)s::bytea[])
           WITH ORDINALITY AS each (src, uri, cid, val, neg, cts, exp, sig, place)
     WHERE NOT EXISTS (SELECT FROM label_own_source AS own WHERE own.src = each.src)
), stored AS (
    INSERT INTO label (src, uri, cid, val, neg, cts, exp, sig)
    SELECT src, uri, cid, val, neg, cts, exp, sig
      FROM given
     WHERE newest IS NULL OR newest IS DISTINCT FROM ROW (neg, cts, exp, sig)
     ORDER BY place
    RETURNING id
), aside AS (
    INSERT INTO label_set_aside (url, seq, place, reason, label)
    SELECT %(url)s, refused.seq, refused.place, refused.reason, refused.label
      FROM moved,
           unnest(%(aside_seq)s::bigint[], %(aside_place)s::integer[], %(aside_reason)s::text[],
                  %(aside_label)s::bytea[]) AS refused (seq, place, reason, label)
), gone AS (
    -- The oldest are deleted, so that at most `aside_max` are kept, the new ones included.
    DELETE FROM label_set_aside
     WHERE url = %(url)s
       AND cardinality(%(aside_seq)s::bigint[]) > 0
       AND EXISTS (SELECT FROM moved)
       AND id <= (SELECT id FROM label_set_aside
                   WHERE url = %(url)s
                   ORDER BY id DESC
                  OFFSET greatest(0, %(aside_max)s - cardinality(%(aside_seq)s::bigint[]))
                   LIMIT 1)
)
SELECT EXISTS (SELECT FROM moved), (SELECT count(*) FROM stored),
       cardinality(%(src)s::varchar[]) - (SELECT count(*) FROM given);
