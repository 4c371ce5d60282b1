"""The largest seq, and the one way to read a whole number that came as text.

Promises: a number is read from ASCII digits alone and within its bounds, or not at all; a long
text costs nothing. Zeros in front change nothing, as long as the whole has `DIGITS_MAX` digits
at most: `007` is 7.
Does not belong here: what to answer when it is no number.
"""

from __future__ import annotations

#: The largest seq: PostgreSQL's bigint.
SEQ_MAX = 2**63 - 1
DIGITS_MAX = len(str(SEQ_MAX))


def number_in(text: str | bytes, low: int = 0, high: int = SEQ_MAX) -> int | None:
    """Return the number from `low` to `high` that `text` is, None when it is none."""
    # `int` and `isdigit` know the digits of all scripts; `int` also signs, blanks and `1_000`.
    if len(text) > DIGITS_MAX or not (text.isascii() and text.isdigit()):
        return None
    number = int(text)
    return number if low <= number <= high else None


def seconds_in(text: str) -> int | None:
    """Return the seconds of a `Retry-After` (RFC 9110, 10.2.3), None when it holds none.

    Nobody waits that long: more than `SEQ_MAX` is `SEQ_MAX`, so that the caller's bound decides.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    number = number_in(text)
    return SEQ_MAX if number is None else number
