"""Filters: decide which labels a consumer receives.

Promises: `matches` is exact, and cheap enough to run for each event. Filters with the same meaning
are equal and have the same hash, so that each chunk is filtered once for each distinct filter.
Does not belong here: reading a query string (`web`), the filter's SQL form (`store`).

Source: lexicon `com.atproto.label.queryLabels`, parameters `uriPatterns` and `sources`; `values`
is our addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sse_labels.errors import InvalidRequest
from sse_labels.protocol.formats import (
    URI_MAX_BYTES,
    VAL_MAX_BYTES,
    is_did,
    is_uri,
    is_val,
    problem_in,
    unsafe_in,
)

#: The most entries of one parameter, counted as sent. This bounds the time that one event costs.
FILTER_MAX_ENTRIES = 100
#: The memory of a filter without entries.
EMPTY_BYTES = 1024
#: The memory of an entry without its characters (one to four bytes each): a string's header, and
#: its place in a set that is half empty.
ENTRY_BYTES = 128


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter: a label matches when every part matches. An empty part matches every label.

    A URI matches when it is one of `uris` or begins with one of `uri_prefixes`. `parse_filter`
    returns the parts in canonical form, so that filters with the same meaning are equal.
    """

    sources: frozenset[str] = frozenset()
    uris: frozenset[str] = frozenset()
    uri_prefixes: tuple[str, ...] = ()
    values: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """About how much memory the filter takes, in bytes: sets, and one object for each entry."""
        entries = [*self.sources, *self.uris, *self.uri_prefixes, *self.values]
        return EMPTY_BYTES + sum(ENTRY_BYTES + 4 * len(entry) for entry in entries)

    def of_any_uri(self) -> Filter | None:
        """Return the filter without its URIs, None when it has neither sources nor values."""
        if not (self.sources or self.values):
            return None
        return Filter(sources=self.sources, values=self.values)

    def matches(self, src: str, uri: str, val: str) -> bool:
        """Return whether a label with these fields matches. Strings must be equal byte by byte."""
        if self.values and val not in self.values:
            return False
        if self.sources and src not in self.sources:
            return False
        if self.uris or self.uri_prefixes:
            return uri in self.uris or uri.startswith(self.uri_prefixes)
        return True


def parse_filter(
    sources: Sequence[str], uri_patterns: Sequence[str], values: Sequence[str]
) -> Filter | None:
    """Return the filter that these parameters describe, None when every label matches.

    Different parameters combine with AND, entries of one parameter with OR. A pattern is a whole
    URI, or the start of a URI followed by `*`. A pattern `*` alone matches every URI, whatever the
    other patterns are.
    Raises `InvalidRequest`, which names the parameter, the value and the expected form.
    """
    if not (sources or uri_patterns or values):
        return None
    for name, entries in (("sources", sources), ("uriPatterns", uri_patterns), ("values", values)):
        if len(entries) > FILTER_MAX_ENTRIES:
            raise InvalidRequest(
                f"{name}: got {len(entries)} entries, expected at most {FILTER_MAX_ENTRIES}"
            )
    for source in sources:
        if not is_did(source):
            raise _refusal("sources", source, "a DID, such as 'did:plc:ewvi7nxzyoun6zhxrhs64oiz'")
    for value in values:
        if not is_val(value):
            raise _refusal("values", value, f"a label's value, 1 to {VAL_MAX_BYTES} UTF-8 bytes")
    uris, uri_prefixes = _parse_patterns(uri_patterns)
    if not (sources or uris or uri_prefixes or values):
        return None
    return Filter(frozenset(sources), uris, uri_prefixes, frozenset(values))


def _parse_patterns(patterns: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Split patterns into URIs and prefixes. Drop all that a shorter prefix covers."""
    uris: set[str] = set()
    prefixes: set[str] = set()
    for pattern in patterns:
        prefix = pattern.removesuffix("*")
        if "*" in prefix:
            raise _refusal("uriPatterns", pattern, "'*' at the end only")
        if prefix == pattern:
            # Only a whole URI is checked as a URI: a prefix may end anywhere, even in the scheme.
            if not is_uri(pattern):
                raise _refusal("uriPatterns", pattern, "a URI, or the start of one and then '*'")
            uris.add(pattern)
        else:
            if len(prefix) > URI_MAX_BYTES or unsafe_in(prefix):
                raise _refusal(
                    "uriPatterns", pattern, f"at most {URI_MAX_BYTES} printable characters and '*'"
                )
            prefixes.add(prefix)
    if "" in prefixes:
        return frozenset(), ()
    shortest: list[str] = []
    for prefix in sorted(prefixes):
        # In sorted order, all longer prefixes that begin with this one directly follow it.
        if not (shortest and prefix.startswith(shortest[-1])):
            shortest.append(prefix)
    covered = tuple(shortest)
    return frozenset(uri for uri in uris if not uri.startswith(covered)), covered


def _refusal(parameter: str, value: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{parameter}: {problem_in(value)}, expected {expected}")
