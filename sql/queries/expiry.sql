-- What expires, and whether it was still in force. Ours finds it by label_expiry_idx; Ozone's table
-- has no such index, and each page of `expiring` is a scan of it.

-- name: expiring
-- Rows (date, id, exp) after a date and an id up to another date, by both: the date as it is
-- written. It narrows, and no more: what time an `exp` is, is read by the caller.
SELECT left(exp, 10) COLLATE "C", id, exp
  FROM label
 WHERE exp IS NOT NULL
   AND (left(exp, 10) COLLATE "C", id) > (%(date)s, %(seq)s)
   AND left(exp, 10) COLLATE "C" <= %(last_date)s
   AND neg IS NOT TRUE
 ORDER BY left(exp, 10) COLLATE "C", id
 LIMIT %(limit)s;

-- name: still_in_force
-- Rows (id, src, uri, cid, val, neg, cts, exp, sig) of the seqs that are, up to a seq, the newest of
-- their key and no negation; in no order. How that is found, state.sql tells.
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM (SELECT id, src, uri, cid, val, neg, cts, exp, sig,
               hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0) AS hash
          FROM label
         WHERE id = ANY (%(seqs)s::bigint[])) AS looked
 WHERE neg IS NOT TRUE
   AND id <= %(until)s
   AND {newest_of_key};
