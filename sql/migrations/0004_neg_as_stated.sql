-- From here on neg is as the label states it: null when absent, false when a signature covers it.
-- Until now absence was stored as false; in what is signed the two differ.
ALTER TABLE label DISABLE TRIGGER label_refuse_change;
UPDATE label SET neg = NULL WHERE neg IS FALSE AND sig IS NOT NULL;
ALTER TABLE label ENABLE TRIGGER label_refuse_change;
