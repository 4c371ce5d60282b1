"""What a label is: its checked form on the way in, its JSON form on the way out.

Promises: a `Label` made by `parse_label` keeps the lexicon, survives PostgreSQL and cannot break
the frame it is written into; what is refused is refused by field, with what was got and expected.
Stands at both ends of the corridor: the publisher parses, the store writes the wire form of a row.
Does not belong here: seqs, frames (`sse`), narrowing (`filters`), who may publish.

Sources: lexicon `com.atproto.label.defs#label`; https://atproto.com/specs/did for `did`;
https://atproto.com/specs/at-uri-scheme, /handle, /nsid and /record-key for AT-URIs;
https://atproto.com/specs/lexicon#string-formats for `uri`, `cid`, `datetime`;
https://atproto.com/specs/data-model for `$bytes`; and for the corner cases the test vectors that
implementations share, `interop-test-files/syntax` of bluesky-social/atproto, and for CIDs and URIs
`atproto/syntax/testdata` of bluesky-social/indigo.
"""

from __future__ import annotations

import re
from binascii import a2b_base64, b2a_base64
from calendar import isleap
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sse_labels.errors import InvalidLabel

LABEL_TYPE = "com.atproto.label.defs#label"

DID_MAX_BYTES = 2048  # the hard limit of the DID specification
URI_MAX_BYTES = 8192  # 8 KiB, the specification's limit for the format
CID_MAX_BYTES = 256  # the limit Bluesky's Go implementation (indigo) sets
DATETIME_MAX_BYTES = 64  # the limit both of Bluesky's implementations set
VAL_MAX_BYTES = 128  # `maxLength` in the lexicon, which counts UTF-8 bytes
SIG_MAX_BYTES = 1024  # ours: the signatures in use (K-256, P-256) have 64 bytes

SECONDS_IN_400_YEARS = 146_097 * 86_400


class Label(NamedTuple):
    """One label as its row holds it; every string is exactly as it was given.

    `cid` is `''` when absent, as in Ozone's column, which is NOT NULL; `neg`, `exp` and `sig` are
    None. A `neg` of False was stated: a signature covers it.
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
        """What a newer label must share to take this one's place: (src, uri, cid, val)."""
        return self[1:5]

    @property
    def columns(
        self,
    ) -> tuple[str, str, str, str, bool | None, str, str | None, memoryview | None]:
        """The label: `label_json` and `Label` take these, in this order."""
        return self[1:]


def parse_label(obj: object) -> Label:
    """Return the label that a decoded JSON object describes, nothing reformatted.

    Raises `InvalidLabel` for the first thing wrong; its `field` is `''` when `obj` is no object.
    An optional field is left out, not null: the lexicon knows no nullable field here, and a null
    taken for absent would change what a signature covers. Unknown fields are refused, since a
    misspelt `neg` would publish the opposite of what was meant: `known_fields` is for readers.
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
    """Return a label without the fields that the lexicon does not know: readers ignore those.

    What is no object comes back as it is.
    """
    if not isinstance(obj, dict):
        return obj
    return {name: value for name, value in obj.items() if name in _FIELDS}


def check_subject(label: Label) -> None:
    """Raise `InvalidLabel` for a `uri` that begins as an AT-URI and is none: it names nothing.

    The lexicon asks for a URI alone, so this is for labels that are made here, and not for others'.
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
    """Return the wire form of a label, ready for a JSON encoder; takes the columns as they come.

    Absent fields are left out (an empty `cid`, a `neg` that is null), and `sig` becomes
    `{"$bytes": base64 without padding}`. A `neg` that is false says nothing, and is left out as
    well, unless there is a signature, which covers it: skyware's labelers sign it (0.2). The order
    of the keys is fixed. Nothing is checked: it runs once per event, and the row may be another
    program's.
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
        # No padding: strict readers, Bluesky's Go among them, refuse it.
        label["sig"] = {"$bytes": b2a_base64(sig, newline=False).rstrip(b"=").decode("ascii")}
    return label


# The formats. Each pattern is plain ASCII and meant for `fullmatch`, so that a control character, a
# separator or a lone surrogate cannot pass: `$` would let a trailing line feed through.

_DID = re.compile(r"did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]")
_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:/*[!-.0-~][!-~]*")
_AT_URI = re.compile(
    r"at://"
    # A DID of at most 2048 bytes, or a handle of at most 253: labels of 1 to 63, the last of which
    # begins with a letter.
    r"(?:(?=[^/]{1,2048}(?:/|\Z))did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]"
    r"|(?=[^/]{1,253}(?:/|\Z))(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)+"
    r"[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)"
    # An NSID of at most 317: the first segment begins with a letter, the last has no hyphen.
    r"(?:/(?=[^/]{1,317}(?:/|\Z))[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+\.[a-zA-Z][a-zA-Z0-9]{0,62}"
    # A record key.
    r"(?:/(?!\.{1,2}\Z)[a-zA-Z0-9._:~-]{1,512})?)?"
)
_CID = re.compile(r"(?!Qm)[a-zA-Z0-9+=]{8,}")
_DATETIME = re.compile(
    # The days of every month that has them; whether 29 February exists is left to the year.
    r"[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9])"
    r"|(?:0[13-9]|1[0-2])-30|(?:0[13578]|1[02])-31)"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
    r"(?:Z|(?!-00:00)[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_BASE64 = re.compile(r"[a-zA-Z0-9+/]+={0,2}")

# What no string of a label may hold: Unicode's control characters (NUL, which PostgreSQL cannot
# store, CR and LF, which end a line of a frame, U+0085), the line and paragraph separators, which
# other line splitters take for an end of line, and lone surrogates, which UTF-8 cannot encode.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def is_did(text: str) -> bool:
    """Tell whether `text` is a DID: lower-case method, no path, query or fragment, ≤ 2048 bytes.

    Any method passes and percent-encoding is not decoded, as the specification wants it.
    """
    return len(text) <= DID_MAX_BYTES and _DID.fullmatch(text) is not None


def is_uri(text: str) -> bool:
    """Tell whether `text` is a URI: a scheme (RFC 3986, 3.1), then more than slashes, ≤ 8192 bytes.

    Printable ASCII without spaces: other characters must be percent-encoded (RFC 3986, 2).
    """
    return len(text) <= URI_MAX_BYTES and _URI.fullmatch(text) is not None


def is_at_uri(text: str) -> bool:
    """Tell whether `text` is an AT-URI: `at://`, a DID or handle, then `/` NSID, then `/` key.

    Neither a query nor a fragment, nor a slash at the end: the form that lexicons allow. Every
    AT-URI is a URI, but `at://handle.example.com/nsid/rkey`, which the vectors list as a URI, is
    no AT-URI: `nsid` is no NSID.
    """
    return _AT_URI.fullmatch(text) is not None


def is_cid(text: str) -> bool:
    """Tell whether `text` looks like a CID of version 1: 8 to 256 characters, none decoded.

    Version 0 (`Qm…`) is not allowed in the AT Protocol.
    """
    return len(text) <= CID_MAX_BYTES and _CID.fullmatch(text) is not None


def is_datetime(text: str) -> bool:
    """Tell whether `text` is a datetime of the AT Protocol: RFC 3339 and ISO 8601 at once.

    The day must exist, and the time in UTC must lie in the years 0000 to 9999. A leap second is
    refused, as by Bluesky's implementations: neither JavaScript's `Date` nor Go's `time` parses it.
    """
    if len(text) > DATETIME_MAX_BYTES or _DATETIME.fullmatch(text) is None:
        return False
    if text[5:10] == "02-29" and not isleap(int(text[:4])):
        return False
    if text[-1] != "Z" and text.startswith(("0000-01-01", "9999-12-31")):
        # The two days that an offset can carry out of the four-digit years; `datetime` has no
        # year 0 to ask.
        minutes = int(text[11:13]) * 60 + int(text[14:16])
        offset = int(text[-5:-3]) * 60 + int(text[-2:])
        if text[0] == "0":
            return text[-6] == "-" or minutes >= offset
        return text[-6] == "+" or minutes + offset < 24 * 60
    return True


def is_expired(exp: str | None, now: float) -> bool:
    """Tell whether the time `exp` has passed at `now`, in seconds since 1970."""
    at = expires_at(exp)
    return at is not None and at <= now


def expires_at(exp: str | None) -> float | None:
    """Return the time `exp` in seconds since 1970; None when it never comes.

    In another program's table a time without an offset is UTC. What cannot be read as a time
    never comes. The date must be written as 2024-05-01: the SQL block `expiring` finds by it.
    """
    if not exp or exp[4:5] != "-" or exp[7:8] != "-":
        return None
    # `datetime` has no year 0. The calendar repeats itself after 400 years.
    is_year_0 = exp.startswith("0000")
    try:
        time = datetime.fromisoformat(f"0400{exp[4:]}" if is_year_0 else exp)
    except ValueError:
        return None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return time.timestamp() - (SECONDS_IN_400_YEARS if is_year_0 else 0)


def is_val(text: str) -> bool:
    """Tell whether `text` can be a label's value: 1 to 128 UTF-8 bytes, all of them safe."""
    if not 0 < len(text) <= VAL_MAX_BYTES or _UNSAFE.search(text) is not None:
        return False
    return text.isascii() or len(text.encode()) <= VAL_MAX_BYTES


def unsafe_in(text: str) -> str | None:
    """Return the complaint about the first character no string here may hold, None if all are fine.

    Those are control characters, U+2028, U+2029 and lone surrogates.
    """
    found = _UNSAFE.search(text)
    if found is None:
        return None
    code = ord(found[0])
    kind = (
        "a lone surrogate"
        if 0xD800 <= code <= 0xDFFF
        else "a line separator"
        if code in (0x2028, 0x2029)
        else "a control character"
    )
    return f"has {kind} (U+{code:04X}) at position {found.start()}, which is not allowed"


_SHOWN_MAX_CHARACTERS = 60


def shown(value: object) -> str:
    """Return a decoded JSON value as an error message names it: short, printable, in JSON's words.

    Long strings are cut, and arrays and objects are not spelt out, so a message stays a line
    whatever was sent.
    """
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, str):
        spelt = repr(value[:_SHOWN_MAX_CHARACTERS])
        if len(value) <= _SHOWN_MAX_CHARACTERS and len(spelt) <= _SHOWN_MAX_CHARACTERS + 2:
            return spelt
        return f"{spelt[:_SHOWN_MAX_CHARACTERS]}…{spelt[0]} ({len(value)} characters)"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        # Python refuses to spell out an int of more than 4300 digits.
        return "a number beyond 64 bits"
    return repr(value)[:_SHOWN_MAX_CHARACTERS]


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

    The digits must be those that encoding the bytes gives: other bits in the last one (RFC 4648,
    3.5) would come out as another text than went in.
    """
    sig = obj["sig"]
    if isinstance(sig, dict) and len(sig) == 1:
        text = sig.get("$bytes")
        if isinstance(text, str) and _BASE64.fullmatch(text):
            digits = text.rstrip("=")
            padding = "=" * (-len(digits) % 4)
            # One digit over holds six bits, which is no byte; padding is whole or not there.
            if len(padding) < 3 and text in (digits, digits + padding):
                decoded = a2b_base64(digits + padding)
                canonical = b2a_base64(decoded, newline=False).decode("ascii") == digits + padding
                if canonical and len(decoded) <= SIG_MAX_BYTES:
                    return decoded
    expected = f'{{"$bytes": base64 of 1 to {SIG_MAX_BYTES} bytes}}'
    if isinstance(sig, dict) and set(sig) == {"$bytes"}:
        raise InvalidLabel("sig", f"$bytes: {_problem(sig['$bytes'])}, expected {expected}")
    raise _refusal(obj, "sig", expected)


def _refusal(obj: dict[Any, Any], field: str, expected: str) -> InvalidLabel:
    if field not in obj:
        return InvalidLabel(field, f"is missing, expected {expected}")
    leave_out = "" if field in _REQUIRED else ", or the field left out"
    return InvalidLabel(field, f"{_problem(obj[field])}, expected {expected}{leave_out}")


def _problem(value: object) -> str:
    got = f"got {shown(value)}"
    unsafe = unsafe_in(value) if isinstance(value, str) else None
    return f"{got}, which {unsafe}" if unsafe else got


def _unknown_field(obj: dict[Any, Any]) -> InvalidLabel:
    name = next(key for key in obj if key not in _FIELDS)
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= _SHOWN_MAX_CHARACTERS
    return InvalidLabel(
        name if plain else shown(name),
        "is not a field of a label, expected only " + ", ".join(sorted(_FIELDS)),
    )
