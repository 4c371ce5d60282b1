-- Deletes old labels. The floor is raised and committed first, and then rows below it are deleted.
-- So a reader that finds a gap also finds the floor above the gap.

-- name: lock_retention
-- One row: whether this session now has the lock for deleting.
SELECT pg_try_advisory_lock(hashtext('sse-labels retention'));

-- name: note_time
-- Nothing; records the head at the current time.
INSERT INTO label_clock (seq) VALUES (%(head)s) ON CONFLICT DO NOTHING;

-- name: oldest_by_age
-- One row: the first seq that may be younger than `seconds`; null when it is unknown.
SELECT max(seq) + 1 FROM label_clock
 WHERE at <= clock_timestamp() - make_interval(secs => %(seconds)s);

-- name: oldest_by_count
-- One row: the oldest of the newest `labels` labels up to the head. No row when there are fewer.
SELECT id FROM label WHERE id <= %(head)s ORDER BY id DESC OFFSET %(labels)s - 1 LIMIT 1;

-- name: raise_floor
-- One row: the floor, which never becomes lower. Notifies every process that listens.
UPDATE label_stream SET floor = greatest(floor, %(floor)s)
RETURNING floor, pg_notify('label_channel', 'floor');

-- name: delete_below_floor
-- One row: the number of deleted labels below the floor. The oldest are deleted first.
WITH old AS (
    SELECT id FROM label WHERE id < (SELECT floor FROM label_stream) ORDER BY id LIMIT %(limit)s
), gone AS (
    DELETE FROM label WHERE id IN (SELECT id FROM old) RETURNING 1
)
SELECT count(*) FROM gone;

-- name: forget_times
-- Nothing; deletes times that retention by age does not need any more.
DELETE FROM label_clock
 WHERE seq < (SELECT max(seq) FROM label_clock WHERE seq < (SELECT floor FROM label_stream));

-- name: forget_requests
-- Nothing; deletes old keys: requests with them are not repeated any more.
DELETE FROM label_request WHERE at < clock_timestamp() - make_interval(secs => %(seconds)s);
