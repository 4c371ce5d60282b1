-- Finds the newest event of a key, for labels in force. The index contains a hash of the key,
-- because an entry of a B-tree has at most 2,704 bytes, and a URI alone may have 8,192.
CREATE INDEX label_key_idx
    ON label (hashtextextended(src || ' ' || uri || ' ' || cid || ' ' || val, 0), id);
