"""The label of all benchmarks: the same bytes, whoever sends them.

Each carries when it was published and its number: `<nanoseconds>.<number>~`. The tilde, which
stands nowhere else on the wire, is what is counted: one byte cannot be split between two reads.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

MARK = ord("~")
SRC = "did:plc:bench3pvqj6kd4wx5sm2yo7t"
CID = "bafyreie5cvv4h45feadgeuwhbcutmh6t2ceseocckahdoe6uat64zmz454"
CTS = "2026-01-01T00:00:00.000Z"
SIGNATURE = bytes(range(64))
SIGNATURE_TEXT = base64.b64encode(SIGNATURE).rstrip(b"=").decode()
#: As many different values as the filters of scenario F choose from.
VALUES = 50
URI = "at://did:plc:account6kd4wx5sm2yo7t3p/app.bsky.feed.post/"

#: Of one event: its id (Nchan's are not numbers), when it was published, and its number.
EVENT = re.compile(rb"id: ?([^\r\n]+)\r?\n(?:event:[^\n]*\n)?data: ?[^\r\n~]*?/(\d+)\.(\d+)~")

COLUMNS = "src, uri, cid, val, cts, sig"
#: Stored history: no time, only the number. Takes the first and the last number.
FILL = f"""
    INSERT INTO label ({COLUMNS})
    SELECT '{SRC}', '{URI}0.' || n || '~', '{CID}', 'value-' || n %% {VALUES}, '{CTS}',
           '\\x{SIGNATURE.hex()}'
      FROM generate_series(%s, %s) AS n
"""
#: The same of so many keys only, each of which has its newest event at the end.
KEYS = 1000
FILL_KEYS = FILL.replace("|| n ||", f"|| n %% {KEYS} ||")
#: A table whose state is a tenth of it. Takes the number of keys, a multiple of 40; there are five
#: times as many rows. Of every ten keys three have one event and one has twenty, which lie all over
#: the table. The newest event of a key in force is one of two; of the others half are negations
#: and half have expired.
FILL_STATE = f"""
    WITH event AS (
        SELECT key, hashint8extended(key * 32 + number, 0) AS place
          FROM generate_series(0, %s - 1) AS key,
               generate_series(1, (ARRAY[1, 1, 1, 2, 2, 3, 4, 6, 10, 20])[1 + key %% 10]) AS number
    ), placed AS (
        SELECT key, place, key / 10 %% 4 AS fate,
               row_number() OVER (PARTITION BY key ORDER BY place DESC) = 1 AS newest
          FROM event
    )
    INSERT INTO label ({COLUMNS}, neg, exp)
    SELECT '{SRC}', '{URI}0.' || key || '~', '{CID}', 'value-' || key %% {VALUES}, '{CTS}',
           '\\x{SIGNATURE.hex()}',
           CASE WHEN newest THEN fate = 2 ELSE place %% 2 = 0 END,
           CASE WHEN newest AND fate = 3 THEN '2020-01-01T00:00:00Z' END
      FROM placed
     ORDER BY place
"""
#: As `@atproto/ozone` 0.1.169 has them, as far as they are looked at.
OZONE_TABLES = """
    CREATE TABLE label (
        id bigserial PRIMARY KEY, src varchar NOT NULL, uri varchar NOT NULL, cid varchar NOT NULL,
        val varchar NOT NULL, neg boolean NOT NULL, cts varchar NOT NULL, exp varchar, sig bytea,
        "signingKeyId" integer
    );
    CREATE UNIQUE INDEX unique_label_idx ON label (src, uri, cid, val);
    CREATE INDEX label_uri_index ON label (uri);
    CREATE TABLE moderation_event (id serial PRIMARY KEY);
    CREATE TABLE signing_key (id serial PRIMARY KEY, key varchar NOT NULL);
"""
#: There a key has one row, its newest; nine of ten are negations. Takes the number of rows.
FILL_OZONE = f"""
    INSERT INTO label ({COLUMNS}, neg)
    SELECT '{SRC}', '{URI}0.' || key || '~', '{CID}', 'value-' || key %% {VALUES}, '{CTS}',
           '\\x{SIGNATURE.hex()}', key %% 10 <> 0
      FROM generate_series(0, %s - 1) AS key
     ORDER BY hashint8extended(key, 0)
"""
#: What is in force, said once more: the newest row of each key, unless negated or expired.
IN_FORCE = """
    SELECT id
      FROM (SELECT DISTINCT ON (src, uri, cid, val) id, neg, exp
              FROM label ORDER BY src, uri, cid, val, id DESC) AS newest
     WHERE neg IS NOT TRUE AND (exp IS NULL OR exp::timestamptz > now())
     ORDER BY id
"""


def uri(nanoseconds: int, number: int) -> str:
    """The subject, which carries the time and the number."""
    return f"{URI}{nanoseconds}.{number}~"


def value(number: int) -> str:
    """The label's value."""
    return f"value-{number % VALUES}"


def row(nanoseconds: int, number: int) -> tuple[Any, ...]:
    """What goes into the table, in the order of `COLUMNS`."""
    return SRC, uri(nanoseconds, number), CID, value(number), CTS, SIGNATURE


def fields(nanoseconds: int, number: int) -> dict[str, Any]:
    """The label as JSON has it."""
    return {
        "ver": 1,
        "src": SRC,
        "uri": uri(nanoseconds, number),
        "cid": CID,
        "val": value(number),
        "cts": CTS,
        "sig": {"$bytes": SIGNATURE_TEXT},
    }


def data(nanoseconds: int, number: int) -> str:
    """The `data:` of an event, as the service makes it; peers are given it ready."""
    event = {"seq": number + 1, "labels": [fields(nanoseconds, number)]}
    return json.dumps(event, separators=(",", ":"))
