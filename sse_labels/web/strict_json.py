"""Parses the JSON of a request, and refuses an object that contains a name twice.

Promises: the result is the value, or an InvalidRequest. Parsers differ on the meaning of a
repeated name (RFC 8259, section 4), and in a label the value of `neg` decides what is stored.

The module uses the standard library's parser: ujson (5.12) silently keeps the last of two values,
and was not faster for bodies of 10,000 labels (25 to 125 ms, against 26 to 75 ms here).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from sse_labels.errors import InvalidRequest


def parse_json(text: str) -> Any:
    """Return the value of `text`. Raises InvalidRequest for wrong or ambiguous JSON."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequest(f"the name {twice[:60]!r} stands twice in one object")
    return members


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")
