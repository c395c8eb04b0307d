"""Input items and tools of the Responses API as a conversation. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import Message, Role, ToolCall
from antefix_router.gateway.fields import Fields
from antefix_router.gateway.openai_messages import Tools, chosen_tools, content_of

_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")


def input_messages(instructions: str, value: Any) -> tuple[Message, ...]:
    """Instructions first. Reasoning, text and calls that follow one another are one assistant turn.

    Raises:  InvalidRequest: an item of a kind that the model cannot take; the field is named.
    """
    messages = [Message(role=Role.SYSTEM, content=instructions)] if instructions else []
    if isinstance(value, str):
        return (*messages, Message(role=Role.USER, content=value))
    if not isinstance(value, list) or not value:
        raise InvalidRequest("input must be a string or a list of items")
    open_turn = False
    for index, item in enumerate(value):
        message = _item(item, f"input[{index}]")
        is_answer = message.role is Role.ASSISTANT
        if is_answer and open_turn and not (message.content and messages[-1].content):
            messages[-1] = _joined(messages[-1], message)
        else:
            messages.append(message)
        open_turn = is_answer
    return tuple(messages)


def _item(item: Any, where: str) -> Message:
    fields = Fields(item, where)
    kind = fields.text("type", "message")
    fields.drop("id", "status")
    if kind == "message":
        role = fields.one_of("role", _ROLES)
        content, breaks = content_of(fields.take("content", ""), fields.name_of("content"), _TEXT_PARTS)
        fields.drop("phase")
        message = Message(role=role, content=content, breaks=breaks)
    elif kind == "function_call":
        call = ToolCall(id=fields.text("call_id"), name=fields.text("name"), arguments=fields.text("arguments", ""))
        fields.drop("namespace", "caller")
        message = Message(role=Role.ASSISTANT, tool_calls=(call,))
    elif kind == "function_call_output":
        content, breaks = content_of(fields.take("output", ""), fields.name_of("output"), _TEXT_PARTS)
        fields.drop("caller")
        message = Message(role=Role.TOOL, content=content, tool_call_id=fields.text("call_id"), breaks=breaks)
    elif kind == "reasoning":
        content, _ = content_of(fields.take("content", ""), fields.name_of("content"), _TEXT_PARTS)
        fields.drop("summary", "encrypted_content")
        message = Message(role=Role.ASSISTANT, reasoning=content)
    else:
        raise InvalidRequest(f"{where}.type: {kind!r} is not supported")
    fields.refuse_rest()
    return message


def _joined(first: Message, second: Message) -> Message:
    return replace(
        first,
        reasoning=first.reasoning + second.reasoning,
        content=first.content + second.content,
        tool_calls=first.tool_calls + second.tool_calls,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputTools:
    """The tools, and how they and the choice among them were sent, for the echo."""

    tools: Tools
    raw: list[Any]
    raw_choice: Any


def input_tools(fields: Fields) -> InputTools:
    items, choice = fields.items("tools", []), fields.peek("tool_choice", "auto")
    functions = [_function(item, f"tools[{index}]") for index, item in enumerate(items)]
    return InputTools(tools=chosen_tools(fields, functions), raw=items, raw_choice=choice)


def _function(item: Any, where: str) -> Fields:
    function = Fields(item, where)
    if function.text("type") != "function":
        raise InvalidRequest(f"{where}.type: only functions are supported")
    function.only("defer_loading", lambda value: value is False, "tools are all loaded at once")
    return function
