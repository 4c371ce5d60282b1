-- For what is in force: the newest event of a label's key. A hash, because an entry of a B-tree
-- holds 2,704 bytes at most and a URI alone may have 8,192.
CREATE INDEX label_key_idx
    ON label (hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0), id);
