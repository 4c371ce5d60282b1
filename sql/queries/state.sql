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

-- name: folded_after
-- Rows (end, looked at, id, src, uri, cid, val, neg, cts, exp, sig), by id: of the first so many
-- rows after a cursor those that are the newest of their key up to a seq, and with `in_force` not
-- negated; `limit` of them at most. `end` is the last row of the window, and `looked at` how many
-- it has: a query is as long as its window, however few rows are kept; when none are, one row has
-- nulls in their place. The window is a subquery, sorted already: what is behind the limit is
-- not probed, and no planner reads the whole table for each page.
WITH edge AS (
    SELECT coalesce(max(id), 0) AS last, count(*) AS looked_at
      FROM (SELECT id FROM label WHERE id > %(cursor)s ORDER BY id LIMIT %(window)s) AS ids
), kept AS (
    SELECT id, src, uri, cid, val, neg, cts, exp, sig
      FROM (SELECT id, src, uri, cid, val, neg, cts, exp, sig,
                   hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0) AS hash
              FROM label
             WHERE id > %(cursor)s
             ORDER BY id
             LIMIT %(window)s) AS looked
     WHERE (NOT %(in_force)s OR neg IS NOT TRUE)
       AND id <= %(until)s
       AND (%(unsigned)s OR sig IS NOT NULL)
       AND (cardinality(%(sources)s::varchar[]) = 0 OR src = ANY (%(sources)s::varchar[]))
       AND (cardinality(%(values)s::varchar[]) = 0 OR val = ANY (%(values)s::varchar[]))
       AND (%(keys_are_unique)s
            OR id = (SELECT newer.id
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
                      LIMIT 1))
     ORDER BY id
     LIMIT %(limit)s
)
SELECT edge.last, edge.looked_at, kept.*
  FROM edge LEFT JOIN kept ON true
 ORDER BY kept.id;
