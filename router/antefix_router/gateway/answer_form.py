"""Reads the form that an answer must have, JSON or tool calls, from a request of each of the three APIs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from antefix_router.chat.messages import ToolRule
from antefix_router.gateway.fields import Fields, WrongField, missing, unsupported, wrong_value


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """is_json: the answer must be JSON, which satisfies `schema` if there is one. param: the field of the request that
    asked for this.
    """

    is_json: bool = False
    schema: dict[str, Any] | None = None
    param: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaNames:
    """The field names of an API's schemas, used in refusals.  tool: a pattern with a place for the tool's number."""

    answer: str = "response_format"
    tool: str = "tools[{}].function.parameters"

    def of_tool(self, number: int) -> str:
        return self.tool.format(number)


CHAT_NAMES = SchemaNames()
RESPONSES_NAMES = SchemaNames(answer="text.format.schema", tool="tools[{}].parameters")
ANTHROPIC_NAMES = SchemaNames(answer="output_config.format.schema", tool="tools[{}].input_schema")


def chat_form(fields: Fields) -> AnswerForm:
    """Read OpenAI's `response_format`.  Raises:  WrongField: a field has an unknown kind or a wrong type."""
    form = fields.child("response_format")
    if form is None:
        return AnswerForm()
    kind = form.text("type")
    if kind == "json_schema":
        inner = form.child("json_schema")
        if inner is None:
            raise missing("response_format.json_schema", "an object with a schema")
        return _schema_form(inner, form.where)
    return _plain_form(kind, form.where)


def flat_form(form: Fields | None) -> AnswerForm:
    """Read `text.format` of the Responses API or `output_config.format` of Anthropic's. The schema is
    directly inside.
    """
    if form is None:
        return AnswerForm()
    kind = form.text("type")
    return _schema_form(form, form.where) if kind == "json_schema" else _plain_form(kind, form.where)


def _schema_form(fields: Fields, param: str) -> AnswerForm:
    schema = fields.take("schema")
    if schema is None:
        raise missing(fields.name_of("schema"), "a JSON schema")
    if not isinstance(schema, dict):
        raise WrongField(f"{fields.name_of('schema')} must be a JSON object", param=param, code="invalid_type")
    # The answer satisfies the schema whatever `strict` says. Name and description are only for people.
    fields.drop("name", "description", "strict")
    return AnswerForm(is_json=True, schema=schema, param=param)


def _plain_form(kind: str, param: str) -> AnswerForm:
    if kind not in ("text", "json_object"):
        raise unsupported(param, f": {kind!r} is not supported; there are text, json_object and json_schema")
    return AnswerForm(is_json=kind == "json_object", param=param)


def openai_rule(choice: Any, names: Collection[str], *, parallel: bool) -> ToolRule | None:
    """Read `tool_choice` of OpenAI's two APIs; None: no tool may be called.

    Raises:  WrongField: it has another form, or names a tool that does not exist.
    """
    if choice in ("auto", None):
        return ToolRule(parallel=parallel)
    if choice == "none":
        return None
    if choice == "required":
        return _must_call(None, names, parallel)
    if not isinstance(choice, Mapping):
        kinds = "auto, none, required and a tool"
        raise unsupported("tool_choice", f": {str(choice)[:80]!r} is not supported; there are {kinds}")
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        return _allowed(allowed if isinstance(allowed, Mapping) else {}, names, parallel)
    return _must_call([_name(choice)], names, parallel)


def _allowed(allowed: Mapping[str, Any], names: Collection[str], parallel: bool) -> ToolRule:
    tools, mode = allowed.get("tools"), allowed.get("mode", "auto")
    if not isinstance(tools, list) or mode not in ("auto", "required"):
        raise unsupported("tool_choice", ": allowed_tools needs a mode, auto or required, and a list of tools")
    chosen = _known([_name(tool) for tool in tools], names)
    return ToolRule(must_call=mode == "required", names=chosen, parallel=parallel)


def _name(tool: Any) -> str:
    """The name of the tool in a `tool_choice`. The chat API wraps the tool's name in "function"; the Responses API does
    not. A choice of a tool that the provider runs gives the tool's kind.
    """
    tool = tool if isinstance(tool, Mapping) else {}
    kind = tool.get("type", "function")
    inner = tool.get("function", tool)
    name = inner.get("name", None if kind in ("function", "custom") else kind) if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise WrongField("tool_choice names no tool", param="tool_choice", code="missing_required_parameter")
    return name


def anthropic_rule(choice: Fields | None, names: Collection[str]) -> ToolRule | None:
    """Read Anthropic's `tool_choice`; None: no tool may be called.  Raises:  WrongField"""
    if choice is None:
        return ToolRule()
    kind = choice.text("type")
    parallel = not choice.boolean("disable_parallel_tool_use")
    if kind == "none":
        return None
    if kind == "auto":
        return ToolRule(parallel=parallel)
    if kind == "any":
        return _must_call(None, names, parallel)
    if kind == "tool":
        return _must_call([choice.text("name")], names, parallel)
    raise unsupported("tool_choice.type", f" must be one of auto, any, tool, none; {kind!r} is not supported")


def _must_call(chosen: list[str] | None, names: Collection[str], parallel: bool) -> ToolRule:
    if not names and chosen is None:
        raise wrong_value("tool_choice", ": there is no tool that could be called here")
    return ToolRule(must_call=True, names=None if chosen is None else _known(chosen, names), parallel=parallel)


def _known(chosen: list[str], names: Collection[str]) -> frozenset[str]:
    if unknown := [name for name in chosen if name not in names]:
        raise wrong_value("tool_choice", f": there is no tool {unknown[0][:80]!r} that could be called here")
    if not chosen:
        raise wrong_value("tool_choice", " names no tool")
    return frozenset(chosen)
