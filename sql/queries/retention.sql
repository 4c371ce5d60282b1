-- How old labels leave. The floor is raised and committed first, and only then are rows below it
-- deleted: a reader that finds a gap finds the floor above it.

-- name: lock_retention
-- One row: whether this session is now the one that deletes.
SELECT pg_try_advisory_lock(hashtext('sse-labels retention'));

-- name: note_time
-- Nothing; remembers that the head stood here now.
INSERT INTO label_clock (seq) VALUES (%(head)s) ON CONFLICT DO NOTHING;

-- name: oldest_by_age
-- One row: the first seq that may be younger than so many seconds; null when that is not known.
SELECT max(seq) + 1 FROM label_clock
 WHERE at <= clock_timestamp() - make_interval(secs => %(seconds)s);

-- name: oldest_by_count
-- One row: the oldest of the newest so many labels up to the head; none when there are fewer.
SELECT id FROM label WHERE id <= %(head)s ORDER BY id DESC OFFSET %(labels)s - 1 LIMIT 1;

-- name: raise_floor
-- One row: the floor, which never sinks. Every process that listens is told.
UPDATE label_stream SET floor = greatest(floor, %(floor)s)
RETURNING floor, pg_notify('label_channel', 'floor');

-- name: delete_below_floor
-- One row: how many labels below the floor were deleted, the oldest first.
WITH old AS (
    SELECT id FROM label WHERE id < (SELECT floor FROM label_stream) ORDER BY id LIMIT %(limit)s
), gone AS (
    DELETE FROM label WHERE id IN (SELECT id FROM old) RETURNING 1
)
SELECT count(*) FROM gone;

-- name: forget_times
-- Nothing; what no horizon can ask for again.
DELETE FROM label_clock
 WHERE seq < (SELECT max(seq) FROM label_clock WHERE seq < (SELECT floor FROM label_stream));

-- name: forget_requests
-- Nothing; keys of requests that are not repeated any more.
DELETE FROM label_request WHERE at < clock_timestamp() - make_interval(secs => %(seconds)s);
