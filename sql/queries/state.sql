-- State instead of events: the newest event of each key (src, uri, cid, val) as of a seq.
--
-- In our own table, the index label_key_idx finds the newest event: the first entry of the key, in
-- the order of the index. After a bulk load or an upgrade, a planner has no statistics of the
-- table. Then it would collect and sort all events of the key, again for each row: 1,000,000 rows
-- took 80 seconds instead of 4, and a key with 20,000 events took 6 ms for each of them. So the
-- condition is a range that contains one hash, and the order begins with the hash: only this index
-- has this order, and the planner's estimate of a range is the same with and without statistics.
-- The CASE has the same purpose: for equal columns the planner would expect one row, and then
-- prefer to sort. In Ozone's table each key has one row (keys_are_unique), and no search is needed.
-- A withheld label (without `unsigned`) does not count as the newest of its key, because no
-- consumer sees it.

-- fragment: newest_of_key
-- Whether the row `looked`, which has the hash of its key, is the newest of its key up to a seq.
(%(keys_are_unique)s
 OR looked.id = (SELECT newer.id
                   FROM label AS newer
                  WHERE hashtextextended(
                            newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                        BETWEEN looked.hash AND looked.hash
                    AND newer.id <= %(until)s AND (%(unsigned)s OR newer.sig IS NOT NULL)
                    AND CASE WHEN newer.src = looked.src AND newer.uri = looked.uri
                              AND newer.cid = looked.cid AND newer.val = looked.val
                             THEN true END
                  ORDER BY hashtextextended(
                            newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                           DESC, newer.id DESC
                  LIMIT 1));

-- fragment: passes
-- Whether the row `looked` passes. An empty array allows every value. Without `unsigned`, only
-- signed labels pass. With `newest`, only the newest label of each key up to a seq passes. With
-- `in_force`, negations do not pass.
looked.id <= %(until)s
AND (NOT %(in_force)s OR looked.neg IS NOT TRUE)
AND (%(unsigned)s OR looked.sig IS NOT NULL)
AND (cardinality(%(sources)s::varchar[]) = 0 OR looked.src = ANY (%(sources)s::varchar[]))
AND (cardinality(%(values)s::varchar[]) = 0 OR looked.val = ANY (%(values)s::varchar[]))
AND (NOT %(newest)s OR {newest_of_key});

-- name: passing_after
-- Rows (end, looked at, id, src, uri, cid, val, neg, cts, exp, sig), by id: those of the first
-- `window` rows after a cursor that pass, at most `limit`. `end` is the last id of the window, and
-- `looked at` is the number of its rows. Both are 0 when the limit was reached. When no row passes,
-- one row has nulls for the label. The window is a sorted subquery: rows after the limit are not
-- checked, and no planner reads the whole table for each page.
WITH kept AS (
    SELECT id, src, uri, cid, val, neg, cts, exp, sig
      FROM (SELECT id, src, uri, cid, val, neg, cts, exp, sig,
                   hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0) AS hash
              FROM label
             WHERE id > %(cursor)s
             ORDER BY id
             LIMIT %(window)s) AS looked
     WHERE (cardinality(%(uris)s::varchar[]) + cardinality(%(prefixes)s::varchar[]) = 0
            OR uri = ANY (%(uris)s::varchar[]) OR uri ^@ ANY (%(prefixes)s::varchar[]))
       AND {passes}
     ORDER BY id
     LIMIT %(limit)s
), edge AS (
    SELECT coalesce(max(id), 0) AS last, count(*) AS looked_at
      FROM (SELECT id FROM label WHERE id > %(cursor)s ORDER BY id LIMIT %(window)s) AS ids
     WHERE (SELECT count(*) FROM kept) < %(limit)s
)
SELECT edge.last, edge.looked_at, kept.*
  FROM edge LEFT JOIN kept ON true
 ORDER BY kept.id;
