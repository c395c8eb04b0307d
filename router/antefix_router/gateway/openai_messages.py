"""OpenAI's chat messages and tools, with DeepSeek's additions, as a conversation. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import ANY_CALLS, Effort, Message, Role, ToolCall, ToolRule
from antefix_router.gateway.answer_form import openai_rule
from antefix_router.gateway.fields import Fields, WrongField, missing, unsupported, wrong_type
from antefix_router.gateway.gateway import function_schema

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
# DeepSeek's own mapping of the efforts that other APIs name.
EFFORTS = {
    "none": Effort.NONE,
    "minimal": Effort.LOW,
    "low": Effort.LOW,
    "medium": Effort.HIGH,
    "high": Effort.HIGH,
    "xhigh": Effort.HIGH,
    "max": Effort.MAX,
    "ultra": Effort.MAX,
}
CACHE_TTLS_S = {"5m": 300.0, "1h": 3600.0}


def chat_messages(items: list[Any]) -> tuple[Message, ...]:
    """Raises:  InvalidRequest: a message is not of a known form; the field is named."""
    if not items:
        raise WrongField("messages is empty", param="messages", code="invalid_value")
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(items))


def _message(item: Any, where: str) -> Message:
    fields = Fields(item, where)
    role = fields.one_of("role", _ROLES)
    # What an assistant only called has no content; everybody else says something, if only the empty text.
    content = fields.take("content", "" if role is Role.ASSISTANT else None)
    content, breaks = content_of(content, f"{where}.content", ("text", "input_text", "output_text"))
    calls: tuple[ToolCall, ...] = ()
    call_id = reasoning = ""
    if role is Role.ASSISTANT:
        calls = tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(fields.items("tool_calls", [])))
        reasoning = fields.text("reasoning_content", "")
        fields.drop("refusal", "annotations", "prefix")
        fields.only("audio", lambda value: not value, "audio is not supported")
    if role is Role.TOOL:
        call_id = fields.text("tool_call_id")
        fields.drop("name")
    fields.refuse_rest()
    return Message(
        role=role, content=content, reasoning=reasoning, tool_calls=calls, tool_call_id=call_id, breaks=breaks
    )


def content_of(value: Any, where: str, types: tuple[str, ...]) -> tuple[str, tuple[tuple[int, float], ...]]:
    """Text, or text parts joined, with the cache breakpoints in them. Raises:  InvalidRequest: images and the like."""
    if isinstance(value, str):
        return value, ()
    if value is None:
        raise missing(where, "a string or a list of parts")
    if not isinstance(value, list):
        raise wrong_type(where, "a string or a list of parts")
    text = ""
    breaks: list[tuple[int, float]] = []
    for index, part in enumerate(value):
        fields = Fields(part, f"{where}[{index}]")
        kind = fields.text("type")
        if kind not in types:
            raise unsupported(f"{where}[{index}]", f": this model takes text only, not {kind!r}")
        text += fields.text("text")
        ttl_s = cache_control_of(fields.take("cache_control"), f"{where}[{index}].cache_control")
        fields.drop("annotations", "logprobs", "citations")
        fields.refuse_rest()
        if ttl_s is not None:
            breaks.append((len(text), ttl_s))
    return text, tuple(breaks)


def cache_control_of(value: Any, where: str) -> float | None:
    """The lifetime that a cache breakpoint asks for, in seconds. Raises:  InvalidRequest: not of the known form."""
    if value is None:
        return None
    fields = Fields(value, where)
    if fields.text("type") != "ephemeral":
        raise InvalidRequest(f"{where}.type must be 'ephemeral'")
    ttl_s = fields.one_of("ttl", CACHE_TTLS_S, CACHE_TTLS_S["5m"])
    fields.refuse_rest()
    return ttl_s


def _call(item: Any, where: str) -> ToolCall:
    fields = Fields(item, where)
    fields.only("type", lambda kind: kind == "function", "only function calls are supported")
    function = Fields(fields.take("function"), f"{where}.function")
    call = ToolCall(id=fields.text("id", ""), name=function.text("name"), arguments=function.text("arguments", ""))
    function.refuse_rest()
    fields.drop("index")
    fields.refuse_rest()
    return call


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The schemas that the model is shown, the names of those that are strict, and which of them are to be called."""

    schemas: tuple[dict[str, Any], ...] = ()
    strict: frozenset[str] = frozenset()
    rule: ToolRule = ANY_CALLS


def chat_tools(fields: Fields) -> Tools:
    """`tools` with `tool_choice` and `parallel_tool_calls`. Raises:  InvalidRequest: what cannot be promised."""
    items = [_function(item, f"tools[{index}]") for index, item in enumerate(fields.items("tools", []))]
    return chosen_tools(fields, items)


def chosen_tools(fields: Fields, items: Sequence[Fields]) -> Tools:
    """Tools from their function objects, as OpenAI's two APIs have them."""
    parallel = fields.boolean("parallel_tool_calls", True)
    schemas: list[dict[str, Any]] = []
    strict: set[str] = set()
    for function in items:
        name = function.text("name")
        schemas.append(function_schema(name, function.take("description"), function.take("parameters")))
        strict |= {name} if function.boolean("strict") else set()
        function.refuse_rest()
    rule = openai_rule(fields.take("tool_choice"), [schema["name"] for schema in schemas], parallel=parallel)
    return Tools() if rule is None else Tools(schemas=tuple(schemas), strict=frozenset(strict), rule=rule)


def _function(item: Any, where: str) -> Fields:
    fields = Fields(item, where)
    if fields.text("type") != "function":
        raise unsupported(f"{where}.type", ": only functions are supported")
    function = Fields(fields.take("function"), f"{where}.function")
    fields.refuse_rest()
    return function


def refuse_unsupported(fields: Fields) -> None:
    """Fields of OpenAI's APIs that change the answer in ways that this model does not have; their defaults pass."""
    fields.only("modalities", lambda value: value == ["text"], "text only")
    fields.only("service_tier", lambda value: value in ("auto", "default"), "there is one tier")
    fields.only("verbosity", lambda value: value == "medium", "verbosity is not supported")
    fields.only("prompt_cache_retention", lambda value: value in ("in_memory", "24h"), "in_memory or 24h")
    # They say something about the caller, which changes nothing here.
    fields.drop("metadata", "safety_identifier", "store")
