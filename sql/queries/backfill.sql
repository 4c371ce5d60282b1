-- What backfills read beside rows_after.

-- name: floor
-- One row: the oldest seq still kept.
SELECT floor FROM label_stream;
