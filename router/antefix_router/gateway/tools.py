"""Tools of all APIs as the functions that the model is shown. Pure.

Only functions that the client runs itself can be called here. Tools that a provider would run are left out of the list,
and groups of functions are flattened; both are told of in a header.

Where the client searches tools itself, those with `defer_loading` are not in the list either: each is shown where a
result of the search refers to it. The list would change with each one that is found, and everything behind it miss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import Breakpoint
from antefix_router.chat.strict import check_schema
from antefix_router.gateway.content import breakpoint_ttl
from antefix_router.gateway.fields import Fields, unsupported, wrong_value

_OWN_KINDS = ("function", "custom")
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
    grouped: names that the model is shown, of functions that came in a group.
    deferred: schemas by name, each to be shown where it was found."""

    schemas: tuple[dict[str, Any], ...] = ()
    deferred: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()
    grouped: Mapping[str, GroupedName] = field(default_factory=dict)
    breakpoint: Breakpoint | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*(schema["name"] for schema in self.schemas), *self.deferred))

    def without_schemas(self) -> Tools:
        """For `tool_choice` none: the model is shown no tools, and a breakpoint behind them still counts."""
        return Tools(grouped=self.grouped, deferred=self.deferred, breakpoint=self.breakpoint)


def read_tools(fields: Fields, own_kind: str) -> Tools:
    """`tools`. own_kind: what the API calls a function that its client runs.

    Raises:  WrongField: a tool without a name, or a strict one without a schema that is one.
    """
    reader = _Reader(own_kind)
    tools = fields.children("tools", [])
    reader.defers = any(_SEARCH.match(_name_of(tool)) for tool in tools if tool.peek("type", own_kind) == own_kind)
    for tool in tools:
        reader.add(tool)
    return Tools(
        schemas=tuple(reader.schemas),
        deferred=reader.deferred,
        strict=frozenset(reader.strict),
        grouped=reader.grouped,
        breakpoint=reader.breakpoint,
    )


def _name_of(tool: Fields) -> str:
    function = tool.peek("function")
    name = function.get("name") if isinstance(function, dict) else tool.peek("name")
    return name if isinstance(name, str) else ""


class _Reader:
    """defers: whether there is a function that finds those that are deferred."""

    def __init__(self, own_kind: str) -> None:
        self.defers = False
        self.deferred: dict[str, dict[str, Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        self.strict: set[str] = set()
        self.grouped: dict[str, GroupedName] = {}
        self.breakpoint: Breakpoint | None = None
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
        if is_deferred:
            self.deferred[shown] = written
        else:
            self.schemas.append(written)
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
            self.breakpoint = Breakpoint(ttl_s=ttl_s)


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
    choice = fields.take("tool_choice", "auto")
    if isinstance(choice, dict):
        check_chosen(_chosen_name(choice), tools)
    if choice not in ("auto", "none"):
        raise unsupported("tool_choice", ": the model decides by itself; only 'auto' and 'none' are supported")
    has_tools = bool(tools.schemas)
    fields.only(
        "parallel_tool_calls", lambda value: value is True or not has_tools, "calls may always be parallel here"
    )
    return tools.without_schemas() if choice == "none" else tools


def anthropic_tools(fields: Fields) -> Tools:
    """Raises:  WrongField: as `openai_tools`."""
    tools = read_tools(fields, "custom")
    choice = fields.child("tool_choice")
    kind = choice.text("type") if choice is not None else "auto"
    if choice is not None:
        if kind == "tool":
            check_chosen(choice.text("name"), tools)
        if kind not in ("auto", "none"):
            raise unsupported("tool_choice", ": the model decides by itself; only 'auto' and 'none' are supported")
        choice.only("disable_parallel_tool_use", lambda value: value is False, "calls may always be parallel here")
    return tools.without_schemas() if kind == "none" else tools


def check_chosen(name: str | None, tools: Tools) -> None:
    """Raises:  WrongField: there is no tool of this name; one that was left out is not there either."""
    if name is not None and name not in tools.names:
        raise wrong_value("tool_choice", f": there is no tool {name[:80]!r} that could be called here")


def _chosen_name(choice: dict[str, Any]) -> str | None:
    """The tool that a choice names, or None. Choices of a provider's tool name its kind."""
    kind = choice.get("type", "function")
    if kind == "allowed_tools":
        return None
    function = choice.get("function")
    inner = function if isinstance(function, dict) else choice
    name = inner.get("name", kind if kind not in _OWN_KINDS else None)
    return name if isinstance(name, str) else None
