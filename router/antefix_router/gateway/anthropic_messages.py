"""Anthropic's messages, system blocks and tools as a conversation. Pure."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import Effort, Message, Role, ToolCall
from antefix_router.gateway.answer_form import anthropic_rule
from antefix_router.gateway.fields import Fields, missing
from antefix_router.gateway.gateway import function_schema
from antefix_router.gateway.openai_messages import EFFORTS, Tools, cache_control_of, content_of

_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT}


def anthropic_messages(system: Any, items: list[Any]) -> tuple[Message, ...]:
    """System text first, then the turns; a turn with tool results becomes one message for each of them.

    Raises:  InvalidRequest: a block of a kind that the model cannot take; the field is named.
    """
    messages: list[Message] = []
    if system is not None:
        text, breaks = content_of(system, "system", ("text",))
        if text:
            messages.append(Message(role=Role.SYSTEM, content=text, breaks=breaks))
    if not items:
        raise InvalidRequest("messages is empty")
    for index, item in enumerate(items):
        where = f"messages[{index}]"
        fields = Fields(item, where)
        role = fields.one_of("role", _ROLES)
        content = fields.take("content")
        fields.refuse_rest()
        turn = _assistant if role is Role.ASSISTANT else _user
        messages += turn([{"type": "text", "text": content}] if isinstance(content, str) else content, where)
    return tuple(messages)


def _user(blocks: Any, where: str) -> list[Message]:
    """Tool results, then what the user says besides."""
    messages: list[Message] = []
    text, breaks = "", list[tuple[int, float]]()
    for fields, kind, ttl_s in _blocks(blocks, where):
        if kind == "tool_result":
            content, inner = content_of(fields.take("content", ""), fields.name_of("content"), ("text",))
            ends = ((len(content), ttl_s),) if ttl_s is not None else inner
            # What failed is told in words: the model has no other field for it.
            content = f"Error: {content}" if fields.boolean("is_error") else content
            call_id = fields.text("tool_use_id")
            messages.append(Message(role=Role.TOOL, content=content, tool_call_id=call_id, breaks=ends))
        elif kind == "text":
            text += fields.text("text")
            fields.drop("citations")
            breaks += [(len(text), ttl_s)] if ttl_s is not None else []
        else:
            raise InvalidRequest(f"{fields.name_of('type')}: this model takes text and tool results, not {kind!r}")
        fields.refuse_rest()
    if text or not messages:
        messages.append(Message(role=Role.USER, content=text, breaks=tuple(breaks)))
    return messages


def _assistant(blocks: Any, where: str) -> list[Message]:
    text, reasoning, calls = "", "", list[ToolCall]()
    breaks: list[tuple[int, float]] = []
    for fields, kind, ttl_s in _blocks(blocks, where):
        if kind == "text":
            text += fields.text("text")
            fields.drop("citations")
        elif kind == "thinking":
            reasoning += fields.text("thinking")
            fields.drop("signature")
        elif kind == "tool_use":
            arguments = json.dumps(fields.take("input", {}), ensure_ascii=False)
            calls.append(ToolCall(id=fields.text("id"), name=fields.text("name"), arguments=arguments))
            fields.drop("caller")
        else:
            raise InvalidRequest(f"{fields.name_of('type')}: {kind!r} is not supported")
        fields.refuse_rest()
        breaks += [(len(text), ttl_s)] if ttl_s is not None else []
    return [
        Message(role=Role.ASSISTANT, content=text, reasoning=reasoning, tool_calls=tuple(calls), breaks=tuple(breaks))
    ]


def _blocks(blocks: Any, where: str) -> list[tuple[Fields, str, float | None]]:
    if blocks is None:
        raise missing(f"{where}.content", "a string or a list of blocks")
    if not isinstance(blocks, list) or not blocks:
        raise InvalidRequest(f"{where}.content must be a string or a list of blocks")
    found = []
    for index, block in enumerate(blocks):
        fields = Fields(block, f"{where}.content[{index}]")
        ttl_s = cache_control_of(fields.take("cache_control"), fields.name_of("cache_control"))
        found.append((fields, fields.text("type"), ttl_s))
    return found


def anthropic_tools(fields: Fields) -> tuple[Tools, float | None]:
    """The tools, and the lifetime of a breakpoint on one of them (all of them are written in one piece)."""
    schemas: list[dict[str, Any]] = []
    strict: set[str] = set()
    break_s: float | None = None
    for index, item in enumerate(fields.items("tools", [])):
        tool = Fields(item, f"tools[{index}]")
        tool.only("type", lambda value: value == "custom", "only the client's own tools are supported")
        ttl_s = cache_control_of(tool.take("cache_control"), tool.name_of("cache_control"))
        break_s = ttl_s if ttl_s is not None else break_s
        name = tool.text("name")
        schemas.append(function_schema(name, tool.take("description"), tool.take("input_schema")))
        strict |= {name} if tool.boolean("strict") else set()
        tool.refuse_rest()
    rule = anthropic_rule(fields.take("tool_choice"), [schema["name"] for schema in schemas])
    if rule is None:
        return Tools(), break_s
    return Tools(schemas=tuple(schemas), strict=frozenset(strict), rule=rule), break_s


def anthropic_effort(fields: Fields, config: Fields) -> Effort | None:
    """`thinking` and `output_config.effort`; without either the model does not think, as with Anthropic."""
    effort: Effort | None = config.one_of("effort", EFFORTS, None)
    value = fields.take("thinking")
    if value is None:
        return effort or Effort.NONE
    thinking = Fields(value, "thinking")
    enabled = thinking.one_of("type", {"enabled": True, "adaptive": True, "disabled": False}, False)
    # How long the model thinks is up to its effort; a budget is an upper bound that max_tokens keeps as well.
    thinking.integer("budget_tokens", low=1)
    thinking.drop("display")
    thinking.refuse_rest()
    return (effort or Effort.HIGH) if enabled else Effort.NONE


def top_level_cache_control(messages: tuple[Message, ...], value: Any) -> tuple[Message, ...]:
    """`cache_control` of the whole request: a breakpoint at the end of the last message."""
    ttl_s = cache_control_of(value, "cache_control")
    if ttl_s is None:
        return messages
    last = messages[-1]
    return (*messages[:-1], replace(last, breaks=(*last.breaks, (len(last.content), ttl_s))))


def user_of(value: Any) -> str:
    """`metadata.user_id`: whose cache it is."""
    if value is None:
        return ""
    fields = Fields(value, "metadata")
    user = fields.text("user_id", "")
    fields.refuse_rest()
    return user


def call_input(call: ToolCall) -> Any:
    return json.loads(call.arguments or "{}")
