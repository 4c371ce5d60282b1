"""The formats of strings in a label: DIDs, URIs, CIDs, datetimes, values.

Promises: each `is_…` function checks the format of a string, and changes nothing. A string that
passes has no control character, no line separator and no lone surrogate.

Sources:
- DIDs: https://atproto.com/specs/did
- AT-URIs: https://atproto.com/specs/at-uri-scheme, and /handle, /nsid and /record-key
- `uri`, `cid`, `datetime`: https://atproto.com/specs/lexicon#string-formats
- corner cases: the shared test vectors `interop-test-files/syntax` of bluesky-social/atproto, and
  for CIDs and URIs `atproto/syntax/testdata` of bluesky-social/indigo
"""

from __future__ import annotations

import re
from calendar import isleap
from datetime import UTC, datetime

DID_MAX_BYTES = 2048  # the hard limit of the DID specification
URI_MAX_BYTES = 8192  # 8 KiB, the specification's limit for the format
CID_MAX_BYTES = 256  # the limit of Bluesky's Go implementation (indigo)
DATETIME_MAX_BYTES = 64  # the limit of both of Bluesky's implementations
VAL_MAX_BYTES = 128  # `maxLength` in the lexicon, which counts UTF-8 bytes

SECONDS_IN_400_YEARS = 146_097 * 86_400

# Each pattern allows ASCII alone and is used with `fullmatch`, so that no control character, no
# separator and no lone surrogate passes. With `$` a trailing line feed would pass.

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
    # The days that each month has. `is_datetime` checks whether the year has a 29 February.
    r"[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9])"
    r"|(?:0[13-9]|1[0-2])-30|(?:0[13578]|1[02])-31)"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
    r"(?:Z|(?!-00:00)[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)

# The characters that no string of a label may contain:
# - Unicode's control characters: PostgreSQL cannot store NUL, CR and LF end a line of a frame;
# - the line and paragraph separators: some line splitters split at them;
# - lone surrogates: UTF-8 cannot encode them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def is_did(text: str) -> bool:
    """Return whether `text` is a DID: lower-case method, no path, query or fragment, ≤ 2048 bytes.

    As the specification says, any method passes and percent-encoding is not decoded.
    """
    return len(text) <= DID_MAX_BYTES and _DID.fullmatch(text) is not None


def is_uri(text: str) -> bool:
    """Return whether `text` is a URI: a scheme (RFC 3986, 3.1), not only slashes, ≤ 8192 bytes.

    Printable ASCII without spaces: other characters must be percent-encoded (RFC 3986, 2).
    """
    return len(text) <= URI_MAX_BYTES and _URI.fullmatch(text) is not None


def is_at_uri(text: str) -> bool:
    """Return whether `text` is an AT-URI: `at://`, a DID or handle, then `/` NSID, then `/` key.

    As lexicons require, there is no query, no fragment and no slash at the end. Every AT-URI is a
    URI. The test vectors list `at://handle.example.com/nsid/rkey` as a URI. It is not an AT-URI,
    because `nsid` is not an NSID.
    """
    return _AT_URI.fullmatch(text) is not None


def is_cid(text: str) -> bool:
    """Return whether `text` looks like a CID of version 1, 8 to 256 characters. It is not decoded.

    Version 0 (`Qm…`) is not allowed in the AT Protocol.
    """
    return len(text) <= CID_MAX_BYTES and _CID.fullmatch(text) is not None


def is_datetime(text: str) -> bool:
    """Return whether `text` is a datetime of the AT Protocol: valid in RFC 3339 and in ISO 8601.

    The day must exist, and the time in UTC must be in the years 0000 to 9999. A leap second is
    refused: Bluesky's implementations refuse it too, because neither JavaScript's `Date` nor Go's
    `time` parses it.
    """
    if len(text) > DATETIME_MAX_BYTES or _DATETIME.fullmatch(text) is None:
        return False
    if text[5:10] == "02-29" and not isleap(int(text[:4])):
        return False
    if text[-1] != "Z" and text.startswith(("0000-01-01", "9999-12-31")):
        # On these two days an offset may lead to a year outside 0000 to 9999. `datetime` cannot
        # decide this: it has no year 0.
        minutes = int(text[11:13]) * 60 + int(text[14:16])
        offset = int(text[-5:-3]) * 60 + int(text[-2:])
        if text[0] == "0":
            return text[-6] == "-" or minutes >= offset
        return text[-6] == "+" or minutes + offset < 24 * 60
    return True


def is_expired(exp: str | None, now: float) -> bool:
    """Return whether the time `exp` has passed at `now`, in seconds since 1970."""
    at = expires_at(exp)
    return at is not None and at <= now


def expires_at(exp: str | None) -> float | None:
    """Return the time `exp` in seconds since 1970; None when the label never expires.

    Another program's table may contain a time without an offset: it is UTC. A text that is not a
    time never expires. The date must have the form 2024-05-01: the SQL block `expiring` searches by
    this form.
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
    """Return whether `text` can be a label's value: 1 to 128 UTF-8 bytes, no unsafe character."""
    if not 0 < len(text) <= VAL_MAX_BYTES or _UNSAFE.search(text) is not None:
        return False
    return text.isascii() or len(text.encode()) <= VAL_MAX_BYTES


def unsafe_in(text: str) -> str | None:
    """Return an error text about the first unsafe character, None if there is none.

    Unsafe characters are control characters, U+2028, U+2029 and lone surrogates.
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


def problem_in(value: object) -> str:
    """Return the value as an error message shows it, and the error text of `unsafe_in`."""
    unsafe = unsafe_in(value) if isinstance(value, str) else None
    return f"got {shown(value)}" + (f", which {unsafe}" if unsafe else "")


SHOWN_MAX_CHARACTERS = 60


def shown(value: object) -> str:
    """Return a decoded JSON value as an error message shows it: short, printable, in JSON's words.

    Long strings are cut, and the contents of arrays and objects are not shown. So a message is one
    short line, whatever was sent.
    """
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, str):
        spelt = repr(value[:SHOWN_MAX_CHARACTERS])
        if len(value) <= SHOWN_MAX_CHARACTERS and len(spelt) <= SHOWN_MAX_CHARACTERS + 2:
            return spelt
        return f"{spelt[:SHOWN_MAX_CHARACTERS]}…{spelt[0]} ({len(value)} characters)"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        # Python refuses to spell out an int of more than 4300 digits.
        return "a number beyond 64 bits"
    return repr(value)[:SHOWN_MAX_CHARACTERS]
