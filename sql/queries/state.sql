-- State instead of events: of each key (src, uri, cid, val) its newest event as of a seq.
--
-- Ours finds it by label_key_idx, in the order of that index: its first entry that is of this key
-- is the newest. A planner that knows nothing of the table, after a bulk load or an upgrade, would
-- rather collect all events of the key and sort them, for each row again: 1,000,000 rows took 80
-- seconds instead of 4, and a key of 20,000 events 6 ms for each of them. Hence the condition is a
-- range that holds one hash, and the order begins with the hash: only that index has this order,
-- and an estimate of a range is the same with statistics and without. Hence, too, CASE: what the
-- planner thinks of equal columns would be one row, and that makes it want all of them.
-- In Ozone's table each key has one row (keys_are_unique), and nothing is looked up. What is
-- withheld (not `unsigned`) is the newest of nothing: nobody sees it.

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
-- Whether the row `looked` is asked for. Empty arrays mean any; without `unsigned`, signed labels
-- alone; with `newest`, the newest of each key up to a seq, and with `in_force` unless negated.
looked.id <= %(until)s
AND (NOT %(in_force)s OR looked.neg IS NOT TRUE)
AND (%(unsigned)s OR looked.sig IS NOT NULL)
AND (cardinality(%(sources)s::varchar[]) = 0 OR looked.src = ANY (%(sources)s::varchar[]))
AND (cardinality(%(values)s::varchar[]) = 0 OR looked.val = ANY (%(values)s::varchar[]))
AND (NOT %(newest)s OR {newest_of_key});

-- name: passing_after
-- Rows (end, looked at, id, src, uri, cid, val, neg, cts, exp, sig), by id: of the first so many
-- rows after a cursor those that pass; `limit` of them at most. `end` is the last row of the
-- window, and `looked at` how many it has, both 0 when the limit was reached: a query is as long as
-- its window, however few rows are kept; when none are, one row has nulls in their place. The
-- window is a subquery, sorted already: what is behind the limit is not probed, and no planner
-- reads the whole table for each page.
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
