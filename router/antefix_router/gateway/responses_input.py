"""Converts input items of the Responses API into a conversation. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from antefix_router.chat.messages import ChatRole, Message, ToolCall
from antefix_router.gateway.content import Content, MessageList, as_json, content_of, end_breakpoint, result_of
from antefix_router.gateway.fields import Fields, unsupported, wrong_type, wrong_value
from antefix_router.gateway.signatures import Signatures
from antefix_router.gateway.tools import grouped_name

_ROLES = {
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
}
# Items of tools that a provider runs. A client cannot leave them out of the history.
_SERVED_ELSEWHERE = ("_call", "_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response")


def input_messages(fields: Fields, instructions: str, signatures: Signatures) -> tuple[Message, ...]:
    """The messages, instructions first. Adjacent items of reasoning, text and calls form one turn of the assistant.

    Raises:  WrongField: an item of an unknown kind; the field is named.
    """
    found = MessageList()
    if instructions:
        found.add(Message(role=ChatRole.SYSTEM, content=instructions))
    value = fields.take("input")
    if isinstance(value, str):
        found.add(Message(role=ChatRole.USER, content=value))
        return found.finish(fields.notes)
    if not isinstance(value, list):
        raise wrong_type("input", "a string or a list of items")
    if not value:
        raise wrong_value("input", " is empty")
    reader = _Reader(value, signatures)
    for index, item in enumerate(value):
        reader.read(fields.inside(item, f"input[{index}]"), found)
    return found.finish(fields.notes)


class _Reader:
    """Reads one request's items. Each input item gives one message, which may continue the turn of the previous
    message.
    """

    def __init__(self, items: list[Any], signatures: Signatures) -> None:
        self._by_id = {
            item["id"]: item
            for item in items
            if isinstance(item, dict) and isinstance(item.get("id"), str) and item.get("type") != "item_reference"
        }
        self._signatures = signatures
        self._is_open = False

    def read(self, item: Fields, found: MessageList) -> None:
        if item.takes("type", "item_reference"):
            item = self._referred(item)
        message, said = self._message(item)
        is_answer = message.role is ChatRole.ASSISTANT
        if is_answer and self._is_open and not (message.content and found.messages[-1].content):
            found.messages[-1] = _joined(found.messages[-1], message)
        else:
            found.add(message, said.unseen)
        self._is_open = is_answer

    def _referred(self, item: Fields) -> Fields:
        name = item.text("id")
        if name not in self._by_id:
            raise unsupported(
                item.name_of("id"), f": {name[:80]!r} is not in this input, and earlier requests are not kept here"
            )
        return item.inside(self._by_id[name], item.where)

    def _message(self, item: Fields) -> tuple[Message, Content]:
        kind = item.text("type", "message")
        item.drop("id", "status")
        ends = end_breakpoint(item)
        if kind == "message":
            role = item.one_of("role", _ROLES)
            said = content_of(item, "content", "")
            item.drop("phase")
            message = Message(
                role=role,
                content=said.text,
                name=item.text("name", ""),
                breakpoints=tuple(said.breakpoints),
                part_starts=tuple(said.part_starts),
            )
        elif kind in ("function_call", "custom_tool_call", "local_shell_call"):
            said, message = Content(), Message(role=ChatRole.ASSISTANT, tool_calls=(_call(item, kind),))
        elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
            said = result_of(item, "output")
            item.drop("caller", "name")
            call_id = item.text("call_id", "")
            message = Message(
                role=ChatRole.TOOL, content=said.text, tool_call_id=call_id, breakpoints=tuple(said.breakpoints)
            )
        elif kind == "reasoning":
            said, message = Content(), Message(role=ChatRole.ASSISTANT, reasoning=self._reasoning(item))
        elif kind.endswith(_SERVED_ELSEWHERE):
            item.notes.leave_out(item.where, kind)
            item.drop_rest()
            said, message = Content(), Message(role=ChatRole.ASSISTANT, content=f"[{kind}: not shown]")
        else:
            raise unsupported(item.name_of("type"), f": {kind[:80]!r} is not supported")
        return replace(message, breakpoints=(*message.breakpoints, *ends)), said

    def _reasoning(self, item: Fields) -> str:
        """The reasoning as it was shown; or decrypted, for clients that send nothing else back; or another model's
        summary.
        """
        shown = content_of(item, "content", "").text
        summary = content_of(item, "summary", "").text
        sealed = item.text("encrypted_content", "")
        opened = self._signatures.open(sealed) if sealed else None
        if sealed and opened is None:
            item.notes.call_foreign(item.where)
        return shown or opened or summary


def _call(item: Fields, kind: str) -> ToolCall:
    item.drop("caller")
    call_id = item.text("call_id", "")
    if kind == "local_shell_call":
        return ToolCall(id=call_id, name="local_shell", arguments=as_json(item.take("action", {})))
    name = grouped_name(item.text("namespace", ""), item.text("name"))
    if kind == "custom_tool_call":
        return ToolCall(id=call_id, name=name, arguments=as_json({"input": item.text("input", "")}))
    arguments = item.take("arguments", "")
    return ToolCall(id=call_id, name=name, arguments=arguments if isinstance(arguments, str) else as_json(arguments))


def _joined(first: Message, second: Message) -> Message:
    return replace(
        first,
        reasoning=first.reasoning + second.reasoning,
        content=first.content + second.content,
        tool_calls=first.tool_calls + second.tool_calls,
        breakpoints=(*first.breakpoints, *second.breakpoints),
    )
