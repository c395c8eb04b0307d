"""Any text that a grammar allows fits the schema from which it was made, as read by the format's own parser."""

import asyncio
import json
from functools import cache

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.grammar import Vocabulary
from antefix_decode.grammar_state import Grammars
from antefix_router.chat.answer_grammar import json_grammar, search_regex
from antefix_router.chat.deepseek_v4 import DeepSeekV4Format
from antefix_router.chat.messages import ChatRole, Conversation, Effort, Message, ToolRule
from antefix_router.chat.plain import PlainFormat
from antefix_router.chat.schema import UnusableSchema, UnusableTool
from antefix_router.gateway.calls import Calls
from tests.gateway.obedient import TOKENIZER, VOCAB_SIZE, text_of, walk
from tests.gateway.schemas import objects, rooted, schemas

FORMAT = DeepSeekV4Format()
DSML = "｜DSML｜"


@cache
def vocabulary():
    return Vocabulary(TOKENIZER, VOCAB_SIZE)


def write(grammar, seed):
    """A random answer that the grammar allows."""
    matcher = asyncio.run(Grammars(vocabulary()).matcher(grammar))
    return text_of(walk(matcher, seed))


def accepts(grammar, text):
    """Whether the grammar accepts this answer. None: the text may be the beginning of one."""
    matcher = vocabulary().matcher(grammar)
    assert not matcher.is_error(), matcher.get_error()
    for byte in text.encode():
        if matcher.is_stopped() or not matcher.consume_token(byte):
            return False
    return True if matcher.is_accepting() else None


def asking(tools=(), **settings):
    return Conversation(messages=(Message(role=ChatRole.USER, content="x"),), tools=tuple(tools), **settings)


def read(conversation, text):
    """(name, arguments) of each call in an answer that has only calls."""
    parser, calls = FORMAT.parser(conversation), Calls({})
    for delta in parser.push(text) + parser.finish():
        assert delta.call is not None, delta
        calls.push(delta.call)
    return [(call.name, json.loads(call.arguments)) for call in calls.done]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_a_json_answer_keeps_to_its_schema(schema, seed):
    schema = rooted(schema)
    jsonschema.validate(json.loads(write(json_grammar(schema), seed)), schema)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(parameters=st.lists(objects(schemas(), 4), min_size=1, max_size=3), seed=st.integers(0, 2**32), data=st.data())
def test_a_forced_call_is_read_and_keeps_to_its_tools_schema(parameters, seed, data):
    tools = [{"name": f"tool_{number}", "parameters": rooted(each)} for number, each in enumerate(parameters)]
    rule = ToolRule(must_call=True, parallel=data.draw(st.booleans()))
    conversation = asking(tools, tool_rule=rule, strict=frozenset(tool["name"] for tool in tools))
    calls = read(conversation, write(FORMAT.grammar(conversation), seed))
    assert calls and (rule.parallel or len(calls) == 1)
    schema_of = {tool["name"]: tool["parameters"] for tool in tools}
    for name, arguments in calls:
        jsonschema.validate(arguments, schema_of[name])


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
        "required": ["city", "days"],
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}


def call(name="weather", city="Bern", days="3", more=""):
    parameters = f'<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n'
    parameters += f'<{DSML}parameter name="days" string="false">{days}</{DSML}parameter>\n'
    return f'<{DSML}invoke name="{name}">\n{parameters}{more}</{DSML}invoke>\n'


def block(*calls):
    return f"\n\n<{DSML}tool_calls>\n{''.join(calls)}</{DSML}tool_calls>"


def nested_schema(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


EMPTY = f'<{DSML}invoke name="clock">\n\n</{DSML}invoke>\n'
MUST = FORMAT.grammar(asking([WEATHER, CLOCK], tool_rule=ToolRule(must_call=True)))
ONE = FORMAT.grammar(asking([WEATHER, CLOCK], tool_rule=ToolRule(must_call=True, parallel=False)))
NAMED = FORMAT.grammar(asking([WEATHER, CLOCK], tool_rule=ToolRule(must_call=True, names=frozenset({"clock"}))))
STRICT = FORMAT.grammar(asking([WEATHER, CLOCK], strict=frozenset({"weather"})))
THINKS = FORMAT.grammar(asking([CLOCK], tool_rule=ToolRule(must_call=True), effort=Effort.HIGH))
EITHER = FORMAT.grammar(
    asking(
        [CLOCK], answers_json=True, response_schema={"type": "object", "properties": {}, "additionalProperties": False}
    )
)


@pytest.mark.parametrize(
    ("grammar", "text", "expected"),
    [
        (MUST, block(call()), True),
        (MUST, block(call(), EMPTY, call(city="")), True),
        (MUST, block(call(city="a </p> <b> & </")), True),
        (MUST, block(call(city=f"</{DSML}parameter>")), False),
        (MUST, block(call(days='"3"')), False),
        (MUST, block(call(name="clock")), False),
        (MUST, "Let me see." + block(call()), False),
        (MUST, block(), False),
        (MUST, block(call()) + "x", False),
        (ONE, block(EMPTY), True),
        (ONE, block(EMPTY, EMPTY), False),
        (NAMED, block(EMPTY), True),
        (NAMED, block(call()), False),
        (STRICT, "Just text, with <b> and </", True),
        (STRICT, "Let me see." + block(call()), True),
        (STRICT, "Let me see." + block(call(days="x")), False),
        (STRICT, f"A <{DSML}tool_calls> that is none", False),
        (THINKS, "hm, </thin or so</think>" + block(EMPTY), True),
        (THINKS, "</think>" + block(EMPTY), True),
        (THINKS, "hm, " + block(EMPTY), None),
        (THINKS, "hm</think>no", False),
        (EITHER, "{}", True),
        (EITHER, block(EMPTY), True),
        (EITHER, "hello", False),
    ],
)
def test_which_texts_a_grammar_accepts(grammar, text, expected):
    assert accepts(grammar, text) is expected


def test_without_a_form_there_is_no_grammar():
    assert FORMAT.grammar(asking()) == FORMAT.grammar(asking([WEATHER])) == PlainFormat().grammar(asking()) == ""


def test_special_tokens_are_no_text_and_the_end_comes_at_the_end():
    matcher = vocabulary().matcher("start: /(?s:.{2})/")
    assert not any(vocabulary().matcher("start: /(?s:.*)/").consume_token(token) for token in (256, 258, 259, 261))
    assert matcher.consume_token(ord("a")) and not matcher.deep_copy().consume_token(257)
    assert matcher.consume_token(ord("b")) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        ("b", ["b", "abc"], ["ac", ""]),
        ("^b", ["b", "bc"], ["ab"]),
        ("b$", ["ab"], ["bc"]),
        ("^a/b$", ["a/b"], ["a/bc"]),
        (r"^\d+\$$", ["12$"], ["12"]),
        ("^(a|b)$", ["a", "b"], ["ab"]),
        ("a|b", ["xa", "bx"], ["c"]),
        ("^[$^|]$", ["$", "^", "|"], ["a"]),
        ("a\nb", ["a\nb"], ["ab"]),
    ],
)
def test_a_texts_pattern_is_found_where_json_schema_finds_it(pattern, texts, others):
    grammar = f"start: T\nT: {search_regex(pattern)}\n"
    assert [accepts(grammar, text) for text in texts] == [True] * len(texts)
    assert not any(accepts(grammar, text) for text in others)


@pytest.mark.parametrize("pattern", ["^a|b$", "a^b", "(^a)b", "a$b"])
def test_anchors_inside_are_refused(pattern):
    with pytest.raises(UnusableSchema, match="anchors"):
        search_regex(pattern)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"not": {}}}},
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"type": "object", "properties": {"a": {"if": {"const": 1}, "then": {}}}},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "object", "minProperties": 1},
        {"anyOf": [{"$ref": "#"}]},
        {"anyOf": [{"type": "object"}, {"$ref": "#"}, {"$ref": "#"}]},
        {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, *({"$ref": "#/properties/a"},) * 8]}}},
        {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#/properties/a"}] * 2}}},
        {"type": "object", "properties": {"a": {"items": nested_schema(200)}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {
            "type": "object",
            "properties": {"a": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}},
            "required": ["a"],
        },
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/0"}},
            "required": ["a"],
            "$defs": {str(i): {"anyOf": [{"$ref": f"#/$defs/{(i + j) % 40}"} for j in range(1, 9)]} for i in range(40)},
        },
        {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/x"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"type": "object", "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}},
        {"type": "object", "properties": {"a": {"multipleOf": 999983}}},
        {"type": "object", "properties": {"a": {"minimum": 10**30}}},
        {"type": "object", "properties": {'a">': {}}},
        {"type": "object", "properties": []},
        {"type": "array"},
        {"type": "object", "properties": {"a": {"enum": [f"</{DSML}parameter>"]}}},
    ],
)
def test_what_cannot_be_enforced_is_refused_with_the_tools_number(schema):
    tools = [CLOCK, {"name": "bad", "parameters": schema}]
    with pytest.raises(UnusableTool) as caught:
        FORMAT.grammar(asking(tools, tool_rule=ToolRule(must_call=True), strict=frozenset({"bad"})))
    assert caught.value.number == 1


def test_what_no_one_was_promised_is_dropped_where_it_cannot_be_enforced():
    """Programs write such schemas for tools that are not strict. The enforceable rest of a schema still holds."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string", "format": "color"}, "uniqueItems": True},
            "map": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
        },
        "required": ["tags", "map"],
    }
    conversation = asking([{"name": "t", "parameters": schema}], tool_rule=ToolRule(must_call=True))
    for seed in range(5):
        (_, arguments), *_ = read(conversation, write(FORMAT.grammar(conversation), seed))
        assert arguments.keys() == {"tags", "map"} and all(isinstance(each, int) for each in arguments["map"].values())


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "array"}, '["</p>", "<b>"]', True),
        ({"type": "array"}, f'["</{DSML}parameter>"]', False),
        ({"type": "object"}, '{"a": [{"b": "</"}]}', True),
        ({"type": "object"}, f'{{"a": [{{"b": "</{DSML}x"}}]}}', False),
        ({"type": "object"}, f'{{"</{DSML}": 1}}', False),
        ({"type": ["array", "object"], "items": {}}, f'[["</{DSML}"]]', False),
        ({"type": "object", "properties": {"a": {}}}, f'{{"a": "</{DSML}"}}', False),
        ({"type": "object", "additionalProperties": {"type": "string"}}, '{"x": "y"}', True),
        ({"type": "object", "additionalProperties": {"type": "string"}}, f'{{"x": "</{DSML}"}}', False),
        ({"type": "object", "required": ["a"]}, '{"a": 1}', True),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["b"]}]}, '{"b": 1}', True),
    ],
)
def test_no_closing_tag_stands_inside_a_parameter(schema, value, expected):
    tool = {"name": "t", "parameters": {"type": "object", "properties": {"v": schema}, "required": ["v"]}}
    grammar = FORMAT.grammar(asking([tool], tool_rule=ToolRule(must_call=True)))
    parameter = f'<{DSML}parameter name="v" string="false">{value}</{DSML}parameter>\n'
    assert accepts(grammar, block(f'<{DSML}invoke name="t">\n{parameter}</{DSML}invoke>\n')) is expected


def test_references_into_the_whole_schema_still_find_it():
    tree = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 2},
            "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        },
        "required": ["name", "children"],
        "additionalProperties": False,
    }
    conversation = asking([{"name": "t", "parameters": tree}], tool_rule=ToolRule(must_call=True, parallel=False))
    for seed in range(10):
        ((_, arguments),) = read(conversation, write(FORMAT.grammar(conversation), seed))
        jsonschema.validate(arguments, tree)
