"""Labels: check a label that comes in, and make the JSON form of a label that goes out.

Promises: a `Label` from `parse_label` follows the lexicon, can be stored in PostgreSQL, and cannot
break the frame that contains it. A refusal names the field, the value and the expected form.
Does not belong here: the formats of a label's strings (`formats`).

Sources: lexicon `com.atproto.label.defs#label`; https://atproto.com/specs/data-model for `$bytes`.
"""

from __future__ import annotations

import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from typing import Any, NamedTuple

from sse_labels.errors import InvalidLabel
from sse_labels.protocol.formats import (
    CID_MAX_BYTES,
    DID_MAX_BYTES,
    SHOWN_MAX_CHARACTERS,
    URI_MAX_BYTES,
    VAL_MAX_BYTES,
    is_at_uri,
    is_cid,
    is_datetime,
    is_did,
    is_uri,
    is_val,
    problem_in,
    shown,
)

LABEL_TYPE = "com.atproto.label.defs#label"
SIG_MAX_BYTES = 1024  # our own limit: the signatures in use (K-256, P-256) have 64 bytes


class Label(NamedTuple):
    """One label as its row contains it. Every string is exactly as it was given.

    An absent `cid` is `''`, because Ozone's column is NOT NULL. An absent `neg`, `exp` or `sig` is
    None. A `neg` of False was given as false: a signature covers it.
    """

    src: str
    uri: str
    cid: str
    val: str
    neg: bool | None
    cts: str
    exp: str | None
    sig: bytes | None


class Row(NamedTuple):
    """One event as the SQL blocks return it: its seq, and the columns of its label."""

    seq: int
    src: str
    uri: str
    cid: str
    val: str
    neg: bool | None
    cts: str
    exp: str | None
    sig: memoryview | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(src, uri, cid, val). A newer label with the same key replaces this one."""
        return self[1:5]

    @property
    def columns(
        self,
    ) -> tuple[str, str, str, str, bool | None, str, str | None, memoryview | None]:
        """The label's columns, in the order of the parameters of `label_json` and `Label`."""
        return self[1:]


def parse_label(obj: object) -> Label:
    """Return the label that a decoded JSON object describes. No value is reformatted.

    Raises `InvalidLabel` for the first error. Its `field` is `''` when `obj` is not an object.
    An absent field must be left out. A null is refused: the lexicon has no nullable field here, and
    treating null as absent would change the bytes that a signature covers. Unknown fields are
    refused: a misspelt `neg` would publish the opposite of what was meant. A reader that must
    ignore unknown fields calls `known_fields` first.
    """
    if not isinstance(obj, dict):
        raise InvalidLabel("", f"got {shown(obj)}, expected a JSON object")
    if not obj.keys() <= _FIELDS:
        raise _unknown_field(obj)
    if "ver" in obj and (type(obj["ver"]) is not int or obj["ver"] != 1):
        raise _refusal(obj, "ver", "the integer 1")
    if "$type" in obj and obj["$type"] != LABEL_TYPE:
        raise _refusal(obj, "$type", f"{LABEL_TYPE!r}")
    src = _string(obj, "src", is_did)
    uri = _string(obj, "uri", is_uri)
    cid = _string(obj, "cid", is_cid) if "cid" in obj else ""
    val = _string(obj, "val", is_val)
    neg = obj.get("neg")
    if "neg" in obj and neg is not True and neg is not False:
        raise _refusal(obj, "neg", "true or false")
    cts = _string(obj, "cts", is_datetime)
    exp = _string(obj, "exp", is_datetime) if "exp" in obj else None
    sig = _signature(obj) if "sig" in obj else None
    return Label(src, uri, cid, val, neg, cts, exp, sig)


def known_fields(obj: object) -> object:
    """Return a label without the fields that the lexicon does not know: readers ignore them.

    A value that is not an object is returned unchanged.
    """
    if not isinstance(obj, dict):
        return obj
    return {name: value for name, value in obj.items() if name in _FIELDS}


def check_subject(label: Label) -> None:
    """Raise `InvalidLabel` for a `uri` that begins with `at://` and is not an AT-URI.

    The lexicon allows any URI. So this check is only for labels that are published here.
    """
    if label.uri.startswith("at://") and not is_at_uri(label.uri):
        raise _refusal(label._asdict(), "uri", _EXPECTED_AT_URI)


def label_json(
    src: str,
    uri: str,
    cid: str,
    val: str,
    neg: bool | None,
    cts: str,
    exp: str | None,
    sig: bytes | memoryview | None,
) -> dict[str, Any]:
    """Return the JSON form of a label, ready for a JSON encoder.

    Absent fields are left out: an empty `cid`, a `neg` that is null. `sig` becomes
    `{"$bytes": base64 without padding}`. A `neg` that is false is left out too, because it has no
    meaning. But with a signature it stays, because the signature covers it: skyware's labelers
    (0.2) sign it. The order of the keys is fixed. No value is checked, because this function runs
    once for each event, and the row may come from another program.
    """
    label: dict[str, Any] = {"ver": 1, "src": src, "uri": uri}
    if cid:
        label["cid"] = cid
    label["val"] = val
    if neg or (sig and neg is False):
        label["neg"] = neg
    label["cts"] = cts
    if exp:
        label["exp"] = exp
    if sig:
        # No padding: strict readers, such as Bluesky's Go code, refuse padding.
        label["sig"] = {"$bytes": b2a_base64(sig, newline=False).rstrip(b"=").decode("ascii")}
    return label


_BASE64 = re.compile(r"[a-zA-Z0-9+/]+={0,2}")
_FIELDS = frozenset(("$type", "ver", "src", "uri", "cid", "val", "neg", "cts", "exp", "sig"))
_REQUIRED = frozenset(("src", "uri", "val", "cts"))

_EXPECTED_DATETIME = (
    "a datetime such as '2024-05-01T12:00:00.000Z' (capital T and Z, seconds and a time zone, "
    "an existing day, not -00:00)"
)
_EXPECTED_AT_URI = (
    "an AT-URI, as 'at://' begins: a DID or handle, then perhaps '/' and an NSID, '/' and a record "
    "key, such as 'at://did:plc:ewvi7nxzyoun6zhxrhs64oiz/app.bsky.feed.post/3jzfcijpj2z2a'"
)
_EXPECTED = {
    "src": f"a DID of at most {DID_MAX_BYTES} bytes, such as 'did:plc:ewvi7nxzyoun6zhxrhs64oiz'",
    "uri": f"a URI of at most {URI_MAX_BYTES} bytes: a scheme, ':', then printable ASCII "
    "without spaces",
    "cid": f"a CID of version 1, 8 to {CID_MAX_BYTES} characters",
    "val": f"1 to {VAL_MAX_BYTES} UTF-8 bytes",
    "cts": _EXPECTED_DATETIME,
    "exp": _EXPECTED_DATETIME,
}


def _string(obj: dict[Any, Any], field: str, is_valid: Callable[[str], bool]) -> str:
    value = obj.get(field)
    if isinstance(value, str) and is_valid(value):
        return value
    raise _refusal(obj, field, _EXPECTED[field])


def _signature(obj: dict[Any, Any]) -> bytes:
    """Decode `{"$bytes": …}`: standard base64 alphabet, with or without padding.

    Encoding the bytes again must give the same digits. Unused bits of the last digit (RFC 4648,
    3.5) must be zero, because otherwise readers would receive another text.
    """
    sig = obj["sig"]
    if isinstance(sig, dict) and len(sig) == 1:
        text = sig.get("$bytes")
        if isinstance(text, str) and _BASE64.fullmatch(text):
            digits = text.rstrip("=")
            padding = "=" * (-len(digits) % 4)
            # A single last digit has six bits, which is no byte. Padding is complete or absent.
            if len(padding) < 3 and text in (digits, digits + padding):
                decoded = a2b_base64(digits + padding)
                canonical = b2a_base64(decoded, newline=False).decode("ascii") == digits + padding
                if canonical and len(decoded) <= SIG_MAX_BYTES:
                    return decoded
    expected = f'{{"$bytes": base64 of 1 to {SIG_MAX_BYTES} bytes}}'
    if isinstance(sig, dict) and set(sig) == {"$bytes"}:
        raise InvalidLabel("sig", f"$bytes: {problem_in(sig['$bytes'])}, expected {expected}")
    raise _refusal(obj, "sig", expected)


def _refusal(obj: dict[Any, Any], field: str, expected: str) -> InvalidLabel:
    if field not in obj:
        return InvalidLabel(field, f"is missing, expected {expected}")
    leave_out = "" if field in _REQUIRED else ", or the field left out"
    return InvalidLabel(field, f"{problem_in(obj[field])}, expected {expected}{leave_out}")


def _unknown_field(obj: dict[Any, Any]) -> InvalidLabel:
    name = next(key for key in obj if key not in _FIELDS)
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= SHOWN_MAX_CHARACTERS
    return InvalidLabel(
        name if plain else shown(name),
        "is not a field of a label, expected only " + ", ".join(sorted(_FIELDS)),
    )
