"""JSON in which every name stands once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels.errors import InvalidRequest
from sse_labels.web.strict_json import parse_json

AMBIGUOUS = {
    '{"labels":[{"val":"spam"},{"neg":true,"neg":false}]}': "neg",
    '{"labels":[{"sig":{"$bytes":"AQ","$bytes":"Ag"}}]}': "$bytes",
    '{"labels":[1],"labels":[2]}': "labels",
    '{"a" : 1, "b": 2, "a"\n: 3}': "a",
    '{"neg":true,"\\u006eeg":false}': "neg",
    "[" * 400 + '{"a":1,"a":2}' + "]" * 400: "a",
}
NOT_JSON = ["", "{", "NaN", '{"a":Infinity}', '{"a":-Infinity}', "[1] 2", "'a'", "[" * 100_000]


@pytest.mark.parametrize(("text", "name"), AMBIGUOUS.items(), ids=lambda text: text[:40])
def test_a_name_that_stands_twice_is_refused(text: str, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(text)
    assert str(caught.value) == f"the name {name!r} stands twice in one object"


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: text[:12])
def test_what_is_no_json_is_an_invalid_request(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_all_other_json_is_read_as_it_stands(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
