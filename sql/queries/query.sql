-- What queryLabels reads, one block per kind of URI pattern: the planner sees the
-- pattern itself and chooses between the index on uri and the order of ids. That
-- index holds the first 600 characters of a URI: hence each condition stands twice.
-- Empty arrays of sources and values mean any; without `unsigned`, signed labels alone;
-- with `in_force`, the newest of each key up to a seq, unless it is a negation (state.sql
-- tells how it is found). What lies beyond the head is cut off by the caller, for the
-- reason that rows_after gives.

-- name: query_any
-- Rows (id, src, uri, cid, val, neg, cts, exp, sig) of any URI after a cursor, by id.
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM label
 WHERE id > %(cursor)s
   AND (cardinality(%(sources)s::varchar[]) = 0 OR src = ANY (%(sources)s::varchar[]))
   AND (cardinality(%(values)s::varchar[]) = 0 OR val = ANY (%(values)s::varchar[]))
   AND (%(unsigned)s OR sig IS NOT NULL)
   AND (NOT %(in_force)s
        OR neg IS NOT TRUE
       AND (%(keys_are_unique)s
            OR id = (SELECT newer.id
                       FROM label AS newer
                      WHERE hashtextextended(
                                newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                            BETWEEN hashtextextended(
                                label.src || ' ' || label.uri || ' ' || label.cid || ' ' || label.val, 0)
                            AND hashtextextended(
                                label.src || ' ' || label.uri || ' ' || label.cid || ' ' || label.val, 0)
                        AND newer.id <= %(until)s AND (%(unsigned)s OR newer.sig IS NOT NULL)
                        AND CASE WHEN newer.src = label.src AND newer.uri = label.uri
                                  AND newer.cid = label.cid AND newer.val = label.val
                                 THEN true END
                      ORDER BY hashtextextended(
                                newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                               DESC, newer.id DESC
                      LIMIT 1)))
 ORDER BY id
 LIMIT %(limit)s;

-- name: query_exact
-- Likewise, of the URIs listed.
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM label
 WHERE left(uri, 600) = ANY (%(uri_heads)s::text[])
   AND uri = ANY (%(uris)s::varchar[])
   AND id > %(cursor)s
   AND (cardinality(%(sources)s::varchar[]) = 0 OR src = ANY (%(sources)s::varchar[]))
   AND (cardinality(%(values)s::varchar[]) = 0 OR val = ANY (%(values)s::varchar[]))
   AND (%(unsigned)s OR sig IS NOT NULL)
   AND (NOT %(in_force)s
        OR neg IS NOT TRUE
       AND (%(keys_are_unique)s
            OR id = (SELECT newer.id
                       FROM label AS newer
                      WHERE hashtextextended(
                                newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                            BETWEEN hashtextextended(
                                label.src || ' ' || label.uri || ' ' || label.cid || ' ' || label.val, 0)
                            AND hashtextextended(
                                label.src || ' ' || label.uri || ' ' || label.cid || ' ' || label.val, 0)
                        AND newer.id <= %(until)s AND (%(unsigned)s OR newer.sig IS NOT NULL)
                        AND CASE WHEN newer.src = label.src AND newer.uri = label.uri
                                  AND newer.cid = label.cid AND newer.val = label.val
                                 THEN true END
                      ORDER BY hashtextextended(
                                newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                               DESC, newer.id DESC
                      LIMIT 1)))
 ORDER BY id
 LIMIT %(limit)s;

-- name: query_prefix
-- Likewise, of the URIs that a LIKE pattern matches.
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM label
 WHERE left(uri, 600) LIKE %(head_pattern)s
   AND uri LIKE %(pattern)s
   AND id > %(cursor)s
   AND (cardinality(%(sources)s::varchar[]) = 0 OR src = ANY (%(sources)s::varchar[]))
   AND (cardinality(%(values)s::varchar[]) = 0 OR val = ANY (%(values)s::varchar[]))
   AND (%(unsigned)s OR sig IS NOT NULL)
   AND (NOT %(in_force)s
        OR neg IS NOT TRUE
       AND (%(keys_are_unique)s
            OR id = (SELECT newer.id
                       FROM label AS newer
                      WHERE hashtextextended(
                                newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                            BETWEEN hashtextextended(
                                label.src || ' ' || label.uri || ' ' || label.cid || ' ' || label.val, 0)
                            AND hashtextextended(
                                label.src || ' ' || label.uri || ' ' || label.cid || ' ' || label.val, 0)
                        AND newer.id <= %(until)s AND (%(unsigned)s OR newer.sig IS NOT NULL)
                        AND CASE WHEN newer.src = label.src AND newer.uri = label.uri
                                  AND newer.cid = label.cid AND newer.val = label.val
                                 THEN true END
                      ORDER BY hashtextextended(
                                newer.src || ' ' || newer.uri || ' ' || newer.cid || ' ' || newer.val, 0)
                               DESC, newer.id DESC
                      LIMIT 1)))
 ORDER BY id
 LIMIT %(limit)s;
