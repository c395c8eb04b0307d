"""Tools of all APIs as the functions that the model is shown. Pure.

Only functions that the client runs itself can be called here. Tools that a provider would run are left out of the list,
and groups of functions are flattened; both are told of in a header.

Where the client searches tools itself, those with `defer_loading` are not in the list either: each is shown where a
result of the search refers to it. The list would change with each one that is found, and everything behind it miss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import ANY_CALLS, TextBreakpoint, ToolRule
from antefix_router.chat.strict import check_schema
from antefix_router.gateway.answer_form import anthropic_rule, openai_rule
from antefix_router.gateway.content import breakpoint_ttl
from antefix_router.gateway.fields import Fields, wrong_value

# What clients call the function by which the model finds the others.
_SEARCH: Final = re.compile(r"tool_?search", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GroupedName:
    """A function's name as its client knows it: within a group."""

    group: str
    name: str


@dataclass(slots=True)
class Tools:
    """schemas: what the model is shown.  strict: names of tools whose calls must keep to their schema.
    grouped: names that the model is shown, of functions that came in a group.  rule: which of them are to be called.
    deferred: those of the schemas, by name, that are not listed but shown where they were found."""

    schemas: tuple[dict[str, Any], ...] = ()
    deferred: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()
    grouped: Mapping[str, GroupedName] = field(default_factory=dict)
    breakpoint: TextBreakpoint | None = None
    rule: ToolRule = ANY_CALLS

    @property
    def names(self) -> frozenset[str]:
        return frozenset(schema["name"] for schema in self.schemas)

    def without_schemas(self) -> Tools:
        """For `tool_choice` none: the model is shown no tools, and a breakpoint behind them still counts."""
        return Tools(grouped=self.grouped, breakpoint=self.breakpoint)


def read_tools(fields: Fields, own_kind: str) -> Tools:
    """`tools`. own_kind: what the API calls a function that its client runs.

    Raises:  WrongField: a tool without a name, or a strict one without a schema that is one.
    """
    reader = _Reader(own_kind)
    tools = fields.children("tools", [])
    # Only Anthropic's API has a way to refer to what was found.
    reader.defers = own_kind == "custom" and any(
        _SEARCH.match(str(tool.peek("name"))) for tool in tools if tool.peek("type", own_kind) == own_kind
    )
    for tool in tools:
        reader.add(tool)
    return Tools(
        schemas=tuple(reader.schemas),
        deferred=reader.deferred,
        strict=frozenset(reader.strict),
        grouped=reader.grouped,
        breakpoint=reader.breakpoint,
    )


class _Reader:
    """defers: whether there is a function that finds those that are deferred."""

    def __init__(self, own_kind: str) -> None:
        self.defers = False
        self.deferred: dict[str, dict[str, Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        self.strict: set[str] = set()
        self.grouped: dict[str, GroupedName] = {}
        self.breakpoint: TextBreakpoint | None = None
        self._own_kind = own_kind

    def add(self, tool: Fields, group: str = "") -> None:
        self._read_breakpoint(tool)
        kind = tool.text("type", self._own_kind)
        if kind == "namespace" and not group:
            name = tool.text("name")
            tool.notes.flatten(tool.where, f"namespace {name}")
            for inner in tool.children("tools", []):
                self.add(inner, group=name)
        elif kind != self._own_kind:
            tool.notes.leave_out(tool.where, kind)
            tool.drop_rest()
        else:
            # Chat has the function in an object of its own.
            function = tool.child("function") or tool
            if function is not tool:
                self._read_breakpoint(function)
            self._add_function(function, group, is_deferred=self.defers and tool.takes("defer_loading", True))

    def _add_function(self, function: Fields, group: str, *, is_deferred: bool) -> None:
        name = function.text("name")
        shown = grouped_name(group, name)
        if group:
            self.grouped[shown] = GroupedName(group, name)
        of_schema = "input_schema" if function.has("input_schema") else "parameters"
        schema = function.take(of_schema)
        written = function_schema(shown, function.take("description"), schema)
        self.schemas.append(written)
        if is_deferred:
            self.deferred[shown] = written
        if function.boolean("strict"):
            try:
                check_schema(written["parameters"])
            except InvalidRequest as err:
                raise wrong_value(function.name_of(of_schema), f": {err}") from err
            self.strict.add(shown)

    def _read_breakpoint(self, fields: Fields) -> None:
        """All tools are written in one piece, so a breakpoint on one of them lies behind them all."""
        ttl_s = breakpoint_ttl(fields)
        if ttl_s is not None:
            self.breakpoint = TextBreakpoint(ttl_s=ttl_s)


def grouped_name(group: str, name: str) -> str:
    """How the model knows a function of a group; from the two names alone, so that every turn writes it alike."""
    if not group:
        return name
    return f"{group}{name}" if group.endswith("__") else f"{group}__{name}"


def function_schema(name: str, description: Any, parameters: Any) -> dict[str, Any]:
    """A tool as the model is shown it; absent parts stay absent, so that every API gives the same rendering."""
    schema: dict[str, Any] = {"name": name}
    if description is not None:
        schema["description"] = description
    schema["parameters"] = parameters if parameters is not None else {"type": "object", "properties": {}}
    return schema


def openai_tools(fields: Fields) -> Tools:
    """`tools` with `tool_choice` and `parallel_tool_calls`, in chat and in Responses.

    Raises:  WrongField: what cannot be promised, or the choice of a tool that is not there.
    """
    tools = read_tools(fields, "function")
    parallel = fields.boolean("parallel_tool_calls", True)
    return _chosen(tools, openai_rule(fields.take("tool_choice"), tools.names, parallel=parallel))


def anthropic_tools(fields: Fields) -> Tools:
    """Raises:  WrongField: as `openai_tools`."""
    tools = read_tools(fields, "custom")
    return _chosen(tools, anthropic_rule(fields.child("tool_choice"), tools.names))


def _chosen(tools: Tools, rule: ToolRule | None) -> Tools:
    return tools.without_schemas() if rule is None else replace(tools, rule=rule)
