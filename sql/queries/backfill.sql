-- What backfills read. Never beyond the sequencer's head: up to there all is settled.

-- name: rows_between
-- Rows (id, src, uri, cid, val, neg, cts, exp, sig) after a cursor up to the head, by id.
SELECT id, src, uri, cid, val, neg, cts, exp, sig
  FROM label
 WHERE id > %(cursor)s
   AND id <= %(head)s
 ORDER BY id
 LIMIT %(limit)s;

-- name: floor
-- One row: the oldest seq still kept.
SELECT floor FROM label_stream;
