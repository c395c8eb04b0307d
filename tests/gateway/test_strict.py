import pytest

from antefix_router.chat.strict import matches

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["a", "b"]},
        "count": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
        "either": {"anyOf": [{"type": "number"}, {"const": "none"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string"}},
}


@pytest.mark.parametrize(
    "value",
    [{"name": "a"}, {"name": "b", "count": None, "tags": ["x"], "either": 1.5}, {"name": "a", "either": "none"}],
)
def test_arguments_as_the_schema_says_pass(value):
    assert matches(value, SCHEMA)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"name": "c"},
        {"name": "a", "more": 1},
        {"name": "a", "count": 1.5},
        {"name": "a", "count": True},
        {"name": "a", "tags": [1]},
        {"name": "a", "tags": "x"},
        {"name": "a", "either": "some"},
    ],
)
def test_other_arguments_do_not(value):
    assert not matches(value, SCHEMA)
