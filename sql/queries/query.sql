-- What queryLabels reads of URIs, whatever else the table holds: at most `window` rows of each URI
-- or prefix, by the index on uri and in its order. That index holds the first 600 characters of a
-- URI: hence each condition stands twice. Rows in the order of the index, and not by id, so that no
-- planner takes the order of ids and reads the whole table for a URI that it thinks is frequent;
-- for the same reason the URI is a range. What passes, state.sql tells.

-- name: query_exact
-- Rows (end, id, src, uri, cid, val, neg, cts, exp, sig) of the URIs listed after a cursor, by id,
-- `limit` at most: of each URI the first rows, and of all URIs no row behind `end`, up to which all
-- were looked at; a null when there is nothing more. One row of nulls when none passes.
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
-- Rows (whole, id, src, uri, cid, val, neg, cts, exp, sig) of the URIs that a LIKE pattern matches,
-- after a cursor, by id, `limit` at most; `whole` says whether the index had fewer than `window`
-- of them, before the cursor too: else there are others, and these are not the first. One row of
-- nulls when none passes.
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
