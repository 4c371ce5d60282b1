-- For what expires soon: `exp` is text in any form that the AT Protocol has, with offsets, so only
-- its date is indexed, a day off at most from the one in UTC. By bytes: a date sorts alike in every
-- collation, and this one never changes under an index.
CREATE INDEX label_expiry_idx ON label ((left(exp, 10) COLLATE "C"), id) WHERE exp IS NOT NULL;
