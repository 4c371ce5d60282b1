"""What a filter lets pass, which filters are one, and which parameters are refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.errors import InvalidRequest
from sse_labels.protocol.filters import FILTER_MAX_ENTRIES, Filter, parse_filter

ALICE, BOB = "did:plc:alice", "did:web:bob.example"
POST = f"at://{ALICE}/app.bsky.feed.post/1"


def the_filter(
    sources: list[str] | None = None,
    uri_patterns: list[str] | None = None,
    values: list[str] | None = None,
) -> Filter:
    made = parse_filter(sources or [], uri_patterns or [], values or [])
    assert made is not None
    return made


def refusal(sources: list[str], uri_patterns: list[str], values: list[str]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse_filter(sources, uri_patterns, values)
    message = str(caught.value)
    # Whatever was sent, the answer is one short line that UTF-8 can encode.
    assert len(message.encode()) < 500
    assert message.isprintable()
    assert caught.value.status == 400
    return message


class TestMatching:
    def test_an_empty_filter_lets_everything_pass(self) -> None:
        assert Filter().matches(ALICE, POST, "spam")

    def test_a_source_passes_when_it_is_one_of_those_listed(self) -> None:
        only = the_filter(sources=[ALICE, BOB])
        assert only.matches(ALICE, POST, "spam")
        assert only.matches(BOB, POST, "spam")
        assert not only.matches("did:plc:alic", POST, "spam")

    def test_a_value_passes_when_it_is_one_of_those_listed(self) -> None:
        only = the_filter(values=["spam", "!hide"])
        assert only.matches(ALICE, POST, "!hide")
        assert not only.matches(ALICE, POST, "Spam")

    def test_a_whole_uri_passes_alone(self) -> None:
        only = the_filter(uri_patterns=[POST])
        assert only.matches(ALICE, POST, "spam")
        assert not only.matches(ALICE, POST + "2", "spam")
        assert not only.matches(ALICE, POST[:-1], "spam")

    def test_a_prefix_passes_itself_and_all_that_begins_with_it(self) -> None:
        only = the_filter(uri_patterns=[f"at://{ALICE}*"])
        assert only.matches(ALICE, f"at://{ALICE}", "spam")
        assert only.matches(ALICE, POST, "spam")
        assert not only.matches(ALICE, f"at://{ALICE}"[:-1], "spam")

    @pytest.mark.parametrize("special", ["%", "_", "?", ".", "[a-z]", "\\"])
    def test_no_character_but_the_last_asterisk_is_special(self, special: str) -> None:
        for pattern in (f"at:{special}", f"at:{special}*"):
            only = the_filter(uri_patterns=[pattern])
            assert only.matches(ALICE, f"at:{special}", "spam")
            assert not only.matches(ALICE, "at:x", "spam")

    def test_patterns_are_alternatives(self) -> None:
        only = the_filter(uri_patterns=[POST, "https:*"])
        assert only.matches(ALICE, POST, "spam")
        assert only.matches(ALICE, "https://example.com", "spam")
        assert not only.matches(ALICE, f"at://{BOB}", "spam")

    def test_every_part_must_agree(self) -> None:
        only = the_filter([ALICE], ["at:*"], ["spam"])
        assert only.matches(ALICE, POST, "spam")
        assert not only.matches(BOB, POST, "spam")
        assert not only.matches(ALICE, "https://example.com", "spam")
        assert not only.matches(ALICE, POST, "porn")


class TestMeaning:
    def test_no_parameter_is_no_filter(self) -> None:
        assert parse_filter([], [], []) is None

    @pytest.mark.parametrize("patterns", [["*"], ["*", "*"], ["*", POST], [POST, "at:*", "*"]])
    def test_the_lone_asterisk_is_no_filter_whatever_stands_beside_it(
        self, patterns: list[str]
    ) -> None:
        assert parse_filter([], patterns, []) is None

    def test_the_lone_asterisk_narrows_nothing_beside_other_parameters(self) -> None:
        assert parse_filter([ALICE], ["*", POST], []) == parse_filter([ALICE], [], [])

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (([ALICE, BOB], [], []), ([BOB, ALICE, BOB], [], [])),
            (([], [], ["a", "b"]), ([], [], ["b", "a", "a"])),
            (([], ["at:*", "https:*"], []), ([], ["https:*", "at:*", "at:*"], [])),
            (([], ["at:*"], []), ([], ["at:*", POST, "at://x*", "at:"[:-1] + ":a*"], [])),
            (([], ["at:x", "at:y"], []), ([], ["at:y", "at:x", "at:y"], [])),
            (([], ["at:x*"], []), ([], ["at:x", "at:x*"], [])),
        ],
    )
    def test_filters_that_mean_the_same_are_equal_and_hash_alike(
        self,
        one: tuple[list[str], list[str], list[str]],
        other: tuple[list[str], list[str], list[str]],
    ) -> None:
        first, second = parse_filter(*one), parse_filter(*other)
        assert first == second
        assert hash(first) == hash(second)

    def test_a_whole_uri_and_a_prefix_are_two_filters(self) -> None:
        assert parse_filter([], ["at:x"], []) != parse_filter([], ["at:x*"], [])

    def test_a_filter_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Filter().values = frozenset({"spam"})  # type: ignore[misc]

    # A small alphabet makes shadowing, duplicates and near misses likely.
    uris = st.text("ab/", max_size=4).map("s:x".__add__)
    some_patterns = st.lists(
        uris | uris.map("{}*".format) | st.sampled_from(["s:xB*", "s:xs:*", "S:x", "s*"]),
        max_size=5,
    )
    patterns = st.lists(
        uris | uris.map("{}*".format) | st.sampled_from(["*", "s*", "s:*"]), max_size=5
    )
    some_sources = st.lists(st.sampled_from([ALICE, BOB, "did:plc:carol"]), max_size=3)
    some_values = st.lists(st.sampled_from(["spam", "porn", "!hide"]), max_size=3)

    @given(some_sources, patterns | some_patterns, some_values)
    def test_a_filter_lets_pass_what_its_parameters_say(
        self, sources: list[str], patterns: list[str], values: list[str]
    ) -> None:
        made = parse_filter(sources, patterns, values)
        # What each pattern names, and its nearest misses.
        stems = {pattern.rstrip("*") for pattern in patterns} | {"s:x"}
        uris = {
            uri
            for stem in stems
            for uri in (stem, stem[:-1], stem + "b", "s:x" + stem, stem.swapcase())
        }
        for src, uri, val in itertools.product([ALICE, BOB], uris, ["spam", "porn"]):
            expected = (
                (not sources or src in sources)
                and (not values or val in values)
                and (
                    not patterns
                    or any(
                        uri[: len(pattern) - 1] == pattern[:-1]
                        if pattern.endswith("*")
                        else uri == pattern
                        for pattern in patterns
                    )
                )
            )
            assert (made is None or made.matches(src, uri, val)) == expected

    @given(patterns, patterns)
    def test_equality_is_equality_of_meaning(self, one: list[str], other: list[str]) -> None:
        def passing(patterns: list[str]) -> set[str]:
            made = parse_filter([], patterns, [])
            return {uri for uri in EVERY_URI if made is None or made.matches(ALICE, uri, "spam")}

        first, second = parse_filter([], one, []), parse_filter([], other, [])
        assert (first == second) == (passing(one) == passing(other))


# Every URI that tells two of those patterns apart: one character longer than the longest, with a
# character no pattern has, and some that only a short prefix lets pass.
EVERY_URI = [
    start + "".join(rest)
    for start, alphabet in (("s:x", "ab/c"), ("s:y", ""), ("sy:", ""), ("t:", ""))
    for length in range(6 if alphabet else 1)
    for rest in itertools.product(alphabet, repeat=length)
]


class TestRefusals:
    @pytest.mark.parametrize(
        "source",
        ["", "*", "did:plc:*", "alice.example", "did:plc:", "did:plc:a\n", "\ud800"],
        ids=ascii,
    )
    def test_a_source_that_is_no_did_is_refused(self, source: str) -> None:
        message = refusal([ALICE, source], [], [])
        assert message.startswith(f"sources: got {source!r}")
        assert "expected a DID" in message

    @pytest.mark.parametrize("pattern", ["**", "a*b", "*a", "at://*/x", "at://*/x*", "at:x**"])
    def test_an_asterisk_anywhere_but_at_the_end_is_refused(self, pattern: str) -> None:
        message = refusal([], [POST, pattern], [])
        assert message == f"uriPatterns: got {pattern!r}, expected '*' at the end only"

    @pytest.mark.parametrize(
        "pattern", ["", "alice.example", "at:", "at://a b", "at://ä"], ids=ascii
    )
    def test_a_pattern_that_is_neither_a_uri_nor_a_prefix_is_refused(self, pattern: str) -> None:
        message = refusal([], [pattern], [])
        assert message.startswith(f"uriPatterns: got {pattern!r}, expected a URI")

    @pytest.mark.parametrize(
        "character",
        ["\x00", "\t", "\n", "\r", "\x7f", "\x85", "\u2028", "\u2029", "\udc80"],
        ids=ascii,
    )
    def test_an_unsafe_character_is_refused_in_every_parameter(self, character: str) -> None:
        told = f"(U+{ord(character):04X}) at position "
        assert told in refusal([f"did:plc:a{character}"], [], [])
        assert told in refusal([], [f"at://a{character}b"], [])
        assert told in refusal([], [f"at://a{character}b*"], [])
        assert told in refusal([], [], [f"a{character}"])

    def test_a_prefix_longer_than_any_uri_is_refused(self) -> None:
        assert the_filter(uri_patterns=["a" * 8192 + "*"])
        assert "expected at most 8192" in refusal([], ["a" * 8193 + "*"], [])

    @pytest.mark.parametrize("value", ["", "v" * 129, "ä" * 65], ids=len)
    def test_a_value_that_no_label_can_have_is_refused(self, value: str) -> None:
        message = refusal([], [], ["spam", value])
        assert message.startswith("values: got '")
        assert "expected a label's value, 1 to 128 UTF-8 bytes" in message

    def test_as_many_entries_as_allowed_are_accepted_and_one_more_is_refused(self) -> None:
        dids = [f"did:plc:{number}" for number in range(FILTER_MAX_ENTRIES + 1)]
        uris = [f"at://{did}" for did in dids]
        full = the_filter(dids[:-1], uris[:-1], dids[:-1])
        assert [len(full.sources), len(full.uris), len(full.values)] == [FILTER_MAX_ENTRIES] * 3
        told = "got 101 entries, expected at most 100"
        assert refusal(dids, [], []) == f"sources: {told}"
        assert refusal([], uris, []) == f"uriPatterns: {told}"
        assert refusal([], [], dids) == f"values: {told}"
