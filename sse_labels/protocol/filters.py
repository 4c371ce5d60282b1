"""What a consumer asked to see: which labels pass, and one value for all who asked the same.

Promises: `matches` is exact and cheap enough to run per event, and filters that mean the same
are equal and hash alike, so that a filter chunk is made once per distinct filter.
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

#: How many entries each parameter may carry, counted as sent. It bounds what one event costs.
FILTER_MAX_ENTRIES = 100
#: What a filter takes without any entry, and what each entry takes beside its characters (one to
#: four bytes each): a string's header, and its place in a set that is half empty.
EMPTY_BYTES = 1024
ENTRY_BYTES = 128


@dataclass(frozen=True, slots=True)
class Filter:
    """The labels that pass: every part must agree, an empty part agrees with anything.

    A URI agrees when it is one of `uris` or begins with one of `uri_prefixes`. Made by
    `parse_filter`, the parts are in canonical form, and equality is equality of meaning.
    """

    sources: frozenset[str] = frozenset()
    uris: frozenset[str] = frozenset()
    uri_prefixes: tuple[str, ...] = ()
    values: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Return about how much memory it takes: sets, and one object for each entry."""
        entries = [*self.sources, *self.uris, *self.uri_prefixes, *self.values]
        return EMPTY_BYTES + sum(ENTRY_BYTES + 4 * len(entry) for entry in entries)

    def of_any_uri(self) -> Filter | None:
        """Return the part of it that is about sources and values, None when there is none."""
        if not (self.sources or self.values):
            return None
        return Filter(sources=self.sources, values=self.values)

    def matches(self, src: str, uri: str, val: str) -> bool:
        """Tell whether the label with these columns passes; case and bytes must agree exactly."""
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
    """Return the filter these parameters describe, None when they let everything pass.

    Entries of one parameter are alternatives. A pattern is a whole URI or, ending in `*`, the
    string that a URI must begin with; the lone `*` lets every URI pass, whatever stands beside it.
    Raises `InvalidRequest` naming the parameter, the value and what was expected.
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
    """Split patterns into URIs and prefixes, without those that a shorter prefix covers anyway."""
    uris: set[str] = set()
    prefixes: set[str] = set()
    for pattern in patterns:
        prefix = pattern.removesuffix("*")
        if "*" in prefix:
            raise _refusal("uriPatterns", pattern, "'*' at the end only")
        if prefix == pattern:
            # Only a whole URI is checked as one: a prefix may end anywhere, in the scheme too.
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
        # Sorted, a prefix stands before all that begin with it, with nothing else in between.
        if not (shortest and prefix.startswith(shortest[-1])):
            shortest.append(prefix)
    covered = tuple(shortest)
    return frozenset(uri for uri in uris if not uri.startswith(covered)), covered


def _refusal(parameter: str, value: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{parameter}: {problem_in(value)}, expected {expected}")
