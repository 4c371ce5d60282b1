-- Finds labels that expire soon. `exp` is text in any form of the AT Protocol, with offsets. So
-- only its date is indexed, which differs from the date in UTC by one day at most. Dates have the
-- same order in every collation, and the collation "C" never changes, so the index stays valid.
CREATE INDEX label_expiry_idx ON label ((left(exp, 10) COLLATE "C"), id) WHERE exp IS NOT NULL;
