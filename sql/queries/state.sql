-- State instead of events: of each key (src, uri, cid, val) its newest event as of a seq.
-- Ours finds it by label_key_idx, Ozone's table by its unique index on the key.

-- name: folded_after
-- Rows (end, looked at, id, src, uri, cid, val, neg, cts, exp, sig), by id: of the first so many
-- rows after a cursor those that are the newest of their key up to a seq, and with `in_force` not
-- negated. `end` is the last row that was looked at, and `looked at` how many were: a query is as
-- long as its window, however few rows are kept; when none are, one row has nulls in their place.
-- The probe is a subquery of its own, so that no planner reads the whole table for each page.
WITH looked AS MATERIALIZED (
    SELECT id, src, uri, cid, val, neg, cts, exp, sig
      FROM label
     WHERE id > %(cursor)s
     ORDER BY id
     LIMIT %(window)s
), edge AS (
    SELECT coalesce(max(id), 0) AS last, count(*) AS looked_at FROM looked
)
SELECT edge.last, edge.looked_at,
       kept.id, kept.src, kept.uri, kept.cid, kept.val, kept.neg, kept.cts, kept.exp, kept.sig
  FROM edge
  LEFT JOIN (
    SELECT looked.*
      FROM looked
     WHERE (NOT %(in_force)s OR neg IS NOT TRUE)
       AND id = (SELECT newer.id
                   FROM label AS newer
                  WHERE hashtextextended(
                            newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                        = hashtextextended(
                            looked.src || ' ' || looked.uri || ' ' || looked.cid || ' ' || looked.val, 0)
                    AND newer.src = looked.src AND newer.uri = looked.uri
                    AND newer.cid = looked.cid AND newer.val = looked.val
                    AND newer.id <= %(until)s
                  ORDER BY newer.id DESC
                  LIMIT 1)
  ) AS kept ON true
 ORDER BY kept.id;
