"""Writes a grammar for tool calls in DSML. `chat.dsml` parses such calls; the grammar makes their arguments satisfy
each tool's schema.

    calls: "<tool_calls>\\n" call+ "</tool_calls>"        call: <invoke name> parameters in the schema's order </invoke>

A text parameter is written as it is, up to its closing tag. All other parameters are JSON. Parameters that the schema
allows without naming them are never written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from antefix_router.chat.answer_grammar import json_answer, json_rule, quoted, search_regex
from antefix_router.chat.dsml import DSML
from antefix_router.chat.messages import Conversation
from antefix_router.chat.schema import (
    Resolver,
    UnusableSchema,
    UnusableTool,
    merged,
    prepared,
    standalone,
    types_of,
)
from antefix_router.chat.tagless import tagless

_CLOSE: Final = f"</{DSML}parameter>"
# No text may contain the beginning of a closing tag, because the parser takes the first one for the end.
_NO_TAG: Final = rf"~/(?s:.*)<\/{DSML}(?s:.*)/"
_NAME: Final = re.compile(r"[^\"<>\n\r]{1,256}")
_FORMATS: Final = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[a-z0-9]+([._-][a-z0-9]+)*@[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)+",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"


def dsml_grammar(conversation: Conversation, *, thinks: bool) -> str:
    """The grammar of an answer that must have a certain form. thinks: the answer begins inside the reasoning.

    Raises:  UnusableSchema, UnusableTool: the form of the answer or of a tool's calls cannot be enforced.
    """
    rule = conversation.tool_rule
    tools = [(number, tool) for number, tool in enumerate(conversation.tools) if rule.may_call(tool["name"])]
    is_json = conversation.answers_json
    begin = f"<{DSML}tool_calls>"
    lines = ["start: think answer\nthink[lazy]: /(?s:.*)<\\/think>/" if thinks else "start: answer"]
    text = json_answer(conversation.response_schema) if is_json else "TEXT"
    if is_json or not rule.must_call:
        lines.append(f"said: {text}")
    if not is_json and not rule.must_call:
        # The parser looks for calls where a block first begins, so free text must not contain the beginning of a block.
        lines.append(rf"TEXT: /(?s:.*)/ & ~/(?s:.*){begin}(?s:.*)/")
        lines.append(rf"intro[lazy]: /(?s:.*){begin}/")
    if tools:
        opening = quoted(f"\n\n{begin}") if is_json or rule.must_call else "intro"
        lines.append(f'calls: {opening} "\\n" call{"+" if rule.parallel else ""} {quoted(f"</{DSML}tool_calls>")}')
        lines.append(f"call: {' | '.join(f'call_{number}' for number, _ in tools)}")
    answers = (["calls"] if tools else []) + ([] if rule.must_call else ["said"])
    lines.append(f"answer: {' | '.join(answers)}")
    for number, tool in tools:
        try:
            lines += call_rules(f"call_{number}", tool, strict=tool["name"] in conversation.strict)
        except UnusableSchema as err:
            raise UnusableTool(number, str(err)) from err
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class _Kinds:
    """The values that a parameter may have: fixed texts, texts that match a form, and JSON values of other types."""

    literals: list[str] = field(default_factory=list)
    texts: list[Mapping[str, Any]] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)


def call_rules(name: str, tool: Mapping[str, Any], *, strict: bool) -> Iterator[str]:
    """The rule `name` for a call of one tool, and the rules that it uses.

    Raises:  UnusableSchema: no call can satisfy the tool's schema, or the schema cannot be enforced.
    """
    root = prepared(tool["parameters"], strict=strict)
    if not _NAME.fullmatch(tool["name"]):
        raise UnusableSchema(f"a tool named {tool['name']!r} cannot be called")
    whole = _Whole(root, strict=strict)
    objects = list(_objects(root, whole))
    arguments = [f"{name}_{number}" for number in range(len(objects))]
    opening = f'<{DSML}invoke name="{tool["name"]}">\n'
    yield f"{name}: {quoted(opening)} ({' | '.join(arguments)}) {quoted(f'</{DSML}invoke>{chr(10)}')}"
    for rule, each in zip(arguments, objects, strict=True):
        yield from _argument_rules(rule, each, whole)


class _Whole(Resolver):
    """The whole schema of a tool. strict: refuse what cannot be enforced."""

    def __init__(self, root: Mapping[str, Any], *, strict: bool) -> None:
        super().__init__(root)
        self.strict = strict


def _objects(schema: Any, whole: _Whole, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The object schemas that a call's arguments may satisfy."""
    whole.step(depth)
    schema = whole.resolved(schema)
    if schema is True:
        schema = {}
    if schema is False or "object" not in types_of(schema) or "enum" in schema or "const" in schema:
        raise UnusableSchema("a tool's parameters must be an object")
    for name in ("anyOf", "oneOf"):
        if name in schema:
            if name == "oneOf" and whole.strict and len(schema[name]) > 1:
                raise UnusableSchema("'oneOf' of whole objects cannot be enforced; 'anyOf' can")
            rest = {key: value for key, value in schema.items() if key != name}
            for option in schema[name]:
                yield from _objects(merged(rest, whole.resolved(option)), whole, depth + 1)
            return
    yield schema


def _argument_rules(name: str, schema: dict[str, Any], whole: _Whole) -> Iterator[str]:
    """Rules for the arguments. Each parameter is followed by the remaining parameters; optional parameters may be left
    out. A call without parameters has an empty line.
    """
    properties = dict(schema.get("properties", {}))
    required = list(dict.fromkeys(schema.get("required", ())))
    for each in required:
        if each not in properties:
            if schema.get("patternProperties"):
                raise UnusableSchema(f"the required {each!r} must stand under 'properties'")
            properties[each] = schema.get("additionalProperties", True)
    known = {each: kinds for each, part in properties.items() if (kinds := _kinds(part, whole)) is not None}
    if missing := [each for each in required if each not in known]:
        raise UnusableSchema(f"no value can be the required {missing[0]!r}")
    if len(required) > schema.get("maxProperties", len(required)):
        raise UnusableSchema("'maxProperties' is less than what is required")
    if whole.strict and len(known) > schema.get("maxProperties", len(known)):
        raise UnusableSchema("'maxProperties' of a tool's parameters cannot be enforced")
    names = list(known)
    last = max((names.index(each) for each in required), default=-1)
    yield f"{name}: {f'{name}_from_0' if names else quoted(chr(10))}" + ("" if required or not names else ' | "\\n"')
    for number, each in enumerate(names):
        here, rest = f"{name}_p{number}", f"{name}_from_{number + 1}"
        is_end = number + 1 == len(names)
        follows = "" if is_end else f" {rest}" if number < last else f" {rest}?"
        skipped = "" if each in required or is_end else f" | {rest}"
        yield f"{name}_from_{number}: {here}{follows}{skipped}"
        yield from _parameter_rules(here, each, known[each], whole.root)


def _kinds(schema: Any, whole: _Whole, depth: int = 0) -> _Kinds | None:
    """The values that a schema allows; None if the schema allows no value."""
    whole.step(depth)
    schema = whole.resolved(schema)
    if schema is False:
        return None
    kinds = _Kinds()
    schema = {} if schema is True else schema
    for name in ("anyOf", "oneOf"):
        if name in schema:
            rest = {key: value for key, value in schema.items() if key != name}
            for option in schema[name]:
                if (found := _kinds(merged(rest, whole.resolved(option)), whole, depth + 1)) is not None:
                    kinds.literals += found.literals
                    kinds.texts += found.texts
                    kinds.others.append({"anyOf": found.others})
            if name == "oneOf" and whole.strict and (len(kinds.texts) > 1 or (kinds.texts and kinds.literals)):
                raise UnusableSchema("'oneOf' of several texts cannot be enforced; 'anyOf' can")
            kinds.others = [{name: options}] if (options := [each for each in kinds.others if each["anyOf"]]) else []
            return kinds if kinds.literals or kinds.texts or kinds.others else None
    if "enum" in schema or "const" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        values = [each for each in values if "enum" not in schema or each in schema["enum"]]
        kinds.literals = [each for each in values if isinstance(each, str) and "string" in types_of(schema)]
        if others := [each for each in values if not isinstance(each, str)]:
            kinds.others = [{**_without(schema, "const"), "enum": others}]
    else:
        if "string" in types_of(schema):
            kinds.texts = [schema]
        if others := [kind for kind in types_of(schema) if kind != "string"]:
            kinds.others = [{**schema, "type": others}]
    if any(f"</{DSML}" in each for each in kinds.literals):
        raise UnusableSchema("a text that is a closing tag cannot be written")
    return kinds if kinds.literals or kinds.texts or kinds.others else None


def _without(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != name}


def _parameter_rules(rule: str, name: str, kinds: _Kinds, root: Mapping[str, Any]) -> Iterator[str]:
    if not _NAME.fullmatch(name):
        raise UnusableSchema(f"a parameter named {name!r} cannot be written")
    opening = f'<{DSML}parameter name="{name}" string="'
    text, other = quoted(f'{opening}true">'), quoted(f'{opening}false">')
    ways = []
    if kinds.literals:
        options = " | ".join(quoted(each + _CLOSE) for each in dict.fromkeys(kinds.literals))
        ways.append(f'{text} ({options}) "\\n"')
    for number, schema in enumerate(kinds.texts):
        ways.append(f'{text} {rule}_t{number} "\\n"')
        terminal = f"{rule}_t{number}".upper()
        yield f"{rule}_t{number}[lazy]: {terminal}_END"
        yield f"{terminal}_END: {terminal} {quoted(_CLOSE)}"
        yield f"{terminal}: {' & '.join(_text_regexes(schema))}"
    for number, schema in enumerate(kinds.others):
        ways.append(f"{other} {rule}_j{number} {quoted(_CLOSE + chr(10))}")
        alone = tagless(standalone(schema, root))
        if f"</{DSML}" in json.dumps(alone, ensure_ascii=False):
            raise UnusableSchema("a closing tag in it cannot be written")
        yield f"{rule}_j{number}: {json_rule(alone)}"
    yield f"{rule}: {' | '.join(ways)}"


def _text_regexes(schema: Mapping[str, Any]) -> Iterator[str]:
    """Regexes for a text parameter, which is written without quotes."""
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if high is not None and high < low:
        raise UnusableSchema("'maxLength' is less than 'minLength'")
    yield f"/(?s:.{{{low},{'' if high is None else high}}})/"
    yield _NO_TAG
    if "pattern" in schema:
        yield search_regex(schema["pattern"])
    if schema.get("format") in _FORMATS:
        yield f"/{_FORMATS[schema['format']]}/"
