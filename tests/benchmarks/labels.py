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
