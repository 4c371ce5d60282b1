-- From now on neg is stored as the label gives it: null when absent, false when a signature covers
-- it. Until now an absent neg was stored as false. A signature differs between the two.
ALTER TABLE label DISABLE TRIGGER label_refuse_change;
UPDATE label SET neg = NULL WHERE neg IS FALSE AND sig IS NOT NULL;
ALTER TABLE label ENABLE TRIGGER label_refuse_change;
