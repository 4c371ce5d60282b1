-- Finds labels that expire, and checks whether they are in force. Our own table has the index
-- label_expiry_idx. Ozone's table has no such index, and each page of `expiring` scans the table.

-- name: expiring
-- Rows (date, id, exp) after a date and an id, up to another date, ordered by date and id. The date
-- is the text in `exp`. The caller computes the exact time of `exp`.
SELECT left(exp, 10) COLLATE "C", id, exp
  FROM label
 WHERE exp IS NOT NULL
   AND (left(exp, 10) COLLATE "C", id) > (%(date)s, %(seq)s)
   AND left(exp, 10) COLLATE "C" <= %(last_date)s
   AND neg IS NOT TRUE
 ORDER BY left(exp, 10) COLLATE "C", id
 LIMIT %(limit)s;

-- name: still_in_force
-- Rows (id, src, uri, cid, val, neg, cts, exp, sig) in no order: those of the given seqs that are
-- the newest of their key up to a seq, and are not negations. state.sql explains the search.
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM (SELECT id, src, uri, cid, val, neg, cts, exp, sig,
               hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0) AS hash
          FROM label
         WHERE id = ANY (%(seqs)s::bigint[])) AS looked
 WHERE neg IS NOT TRUE
   AND id <= %(until)s
   AND {newest_of_key};
