-- Only the newest labels that mirrors set aside are kept, for each upstream. All are counted.
ALTER TABLE label_upstream ADD COLUMN set_aside bigint NOT NULL DEFAULT 0;
UPDATE label_upstream
   SET set_aside = (SELECT count(*) FROM label_set_aside AS aside
                     WHERE aside.url = label_upstream.url);

ALTER TABLE label_set_aside ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY;
DELETE FROM label_set_aside AS aside
 USING (SELECT id, row_number() OVER (PARTITION BY url ORDER BY id DESC) AS age
          FROM label_set_aside) AS ordered
 WHERE aside.id = ordered.id AND age > 1000;
ALTER TABLE label_set_aside ADD PRIMARY KEY (url, id);
