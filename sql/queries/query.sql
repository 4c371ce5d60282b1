-- Labels of URIs, for queryLabels. However large the table is, at most `window` rows of each URI or
-- prefix are read, by the index on uri and in its order. The index contains the first 600
-- characters of a URI, so each condition stands twice: for the index, and for the whole URI. The
-- rows are read in the order of the index and not by id: otherwise a planner may use the index of
-- ids, and read the whole table for a URI that it believes to be frequent. For the same reason the
-- condition on the URI is a range. state.sql explains which rows pass.

-- name: query_exact
-- Rows (end, id, src, uri, cid, val, neg, cts, exp, sig) of the given URIs after a cursor, by id,
-- at most `limit`. All rows up to `end` were looked at, and no row after `end` is returned. `end`
-- is null when there are no more rows. One row of nulls when no row passes.
WITH found AS MATERIALIZED (
    SELECT asked.number, label.*
      FROM unnest(%(uris)s::varchar[]) WITH ORDINALITY AS asked (uri, number)
     CROSS JOIN LATERAL (
           SELECT id, src, uri, cid, val, neg, cts, exp, sig,
                  hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0) AS hash
             FROM label
            WHERE left(label.uri, 600) ~>=~ left(asked.uri, 600)
              AND left(label.uri, 600) ~<=~ left(asked.uri, 600)
              AND label.uri = asked.uri
              AND id > %(cursor)s
            ORDER BY left(label.uri, 600) USING ~<~, id
            LIMIT %(window)s) AS label
), edge AS (
    SELECT min(last) AS "end"
      FROM (SELECT max(id) AS last FROM found GROUP BY number HAVING count(*) = %(window)s) AS ends
), kept AS (
    SELECT id, src, uri, cid, val, neg, cts, exp, sig
      FROM found AS looked
     WHERE looked.id <= coalesce((SELECT "end" FROM edge), looked.id)
       AND {passes}
     ORDER BY id
     LIMIT %(limit)s
)
SELECT edge."end", kept.*
  FROM edge LEFT JOIN kept ON true
 ORDER BY kept.id;

-- name: query_prefix
-- Rows (whole, id, src, uri, cid, val, neg, cts, exp, sig) of the URIs that match a LIKE pattern,
-- after a cursor, by id, at most `limit`. `whole` is true when fewer than `window` rows of the
-- table match, those before the cursor included. If `whole` is false, no rows are returned. One row
-- has nulls for the label when no row passes.
WITH found AS MATERIALIZED (
    SELECT id, src, uri, cid, val, neg, cts, exp, sig,
           hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0) AS hash
      FROM label
     WHERE left(uri, 600) LIKE %(head_pattern)s
     ORDER BY left(uri, 600) USING ~<~, id
     LIMIT %(window)s
), edge AS (
    SELECT count(*) < %(window)s AS whole FROM found
), kept AS (
    SELECT id, src, uri, cid, val, neg, cts, exp, sig
      FROM found AS looked
     WHERE looked.id > %(cursor)s
       AND looked.uri LIKE %(pattern)s
       AND (SELECT whole FROM edge)
       AND {passes}
     ORDER BY id
     LIMIT %(limit)s
)
SELECT edge.whole, kept.*
  FROM edge LEFT JOIN kept ON true
 ORDER BY kept.id;
