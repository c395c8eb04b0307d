"""Reads the tools of all APIs as the functions that the model is shown. Pure.

Only functions that the client runs itself can be called through the router. Tools that the provider would run are left
out of the list, and groups of functions are flattened. A header reports both.

If the client searches for tools itself, tools with `defer_loading` are left out of the list too. Each of these tools is
shown where a search result refers to it. If a tool that was found were added to the list, the list would change with
each search, and everything after it would miss.
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

# The names that clients use for the function that finds deferred tools.
_SEARCH: Final = re.compile(r"tool_?search", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GroupedName:
    """A function's name as its client knows it: a name within a group."""

    group: str
    name: str


@dataclass(slots=True)
class Tools:
    """schemas: the functions that the model is shown.  strict: names of tools whose calls must satisfy their schema.
    grouped: flattened names of functions that came in a group, with the client's names.  rule: which tools must be
    called.
    deferred: schemas, by name, of tools that are shown where they were found instead of in the list.
    """

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
        """The tools if `tool_choice` is none: the model is shown no tools, and a breakpoint after them still counts."""
        return Tools(grouped=self.grouped, breakpoint=self.breakpoint)


def read_tools(fields: Fields, own_kind: str) -> Tools:
    """Read `tools`.  own_kind: the API's kind for a function that its client runs.

    Raises:  WrongField: a tool without a name, or a strict tool without a valid schema.
    """
    reader = _Reader(own_kind)
    tools = fields.children("tools", [])
    # Only Anthropic's API has a way to refer to a found tool.
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
    """defers: whether the client has a function that finds deferred tools."""

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
            # Chat wraps the function in an object.
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
        """Read a tool's breakpoint. All tools are written as one piece, so the breakpoint comes after all of them."""
        ttl_s = breakpoint_ttl(fields)
        if ttl_s is not None:
            self.breakpoint = TextBreakpoint(ttl_s=ttl_s)


def grouped_name(group: str, name: str) -> str:
    """The model's name for a function of a group. The model's name depends only on the names of group and function, so
    that every turn has the same text.
    """
    if not group:
        return name
    return f"{group}{name}" if group.endswith("__") else f"{group}__{name}"


def function_schema(name: str, description: Any, parameters: Any) -> dict[str, Any]:
    """A tool in the form that the model is shown. Parts that are absent stay absent, so that every API gives the same
    rendering.
    """
    schema: dict[str, Any] = {"name": name}
    if description is not None:
        schema["description"] = description
    schema["parameters"] = parameters if parameters is not None else {"type": "object", "properties": {}}
    return schema


def openai_tools(fields: Fields) -> Tools:
    """Read `tools` with `tool_choice` and `parallel_tool_calls`, in chat and in Responses.

    Raises:  WrongField: a form that cannot be enforced, or the choice of a tool that does not exist.
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
