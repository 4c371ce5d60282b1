"""Seqs: the largest seq, and the only function that reads a whole number from text.

Promises: only ASCII digits within the bounds are a number. A text that is too long is refused
before it is parsed. Leading zeros are allowed, up to `DIGITS_MAX` digits in all: `007` is 7.
"""

from __future__ import annotations

#: The largest seq: PostgreSQL's bigint.
SEQ_MAX = 2**63 - 1
DIGITS_MAX = len(str(SEQ_MAX))


def number_in(text: str | bytes, low: int = 0, high: int = SEQ_MAX) -> int | None:
    """Return the number in `text`, None when it is not a number from `low` to `high`."""
    # `int` and `isdigit` accept digits of all scripts. `int` also accepts signs, blanks, `1_000`.
    if len(text) > DIGITS_MAX or not (text.isascii() and text.isdigit()):
        return None
    number = int(text)
    return number if low <= number <= high else None


def seconds_in(text: str) -> int | None:
    """Return the seconds of a `Retry-After` (RFC 9110, 10.2.3), None when it is not a number.

    A larger number than `SEQ_MAX` becomes `SEQ_MAX`: the caller has its own bound.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    number = number_in(text)
    return SEQ_MAX if number is None else number
