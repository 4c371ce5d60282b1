-- name: insert_labels
-- One id per label, increasing in the order of the arrays; all are stored or none.
INSERT INTO label (src, uri, cid, val, neg, cts, exp, sig)
SELECT src, uri, cid, val, neg, cts, exp, sig
  FROM unnest(%(src)s::varchar[], %(uri)s::varchar[], %(cid)s::varchar[], %(val)s::varchar[],
              %(neg)s::boolean[], %(cts)s::varchar[], %(exp)s::varchar[], %(sig)s::bytea[])
       WITH ORDINALITY AS given (src, uri, cid, val, neg, cts, exp, sig, place)
 ORDER BY place
RETURNING id;
