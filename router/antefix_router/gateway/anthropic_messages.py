"""Converts Anthropic's messages and system blocks into a conversation. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from antefix_router.chat.messages import ChatRole, Message, TextBreakpoint, ToolCall
from antefix_router.gateway.content import (
    Content,
    MessageList,
    as_json,
    breakpoint_ttl,
    content_of,
    end_breakpoint,
    result_of,
)
from antefix_router.gateway.fields import Fields, missing, unsupported, wrong_type, wrong_value
from antefix_router.gateway.signatures import Signatures
from antefix_router.gateway.text_check import as_text

# Newer models accept system text in mid-conversation, and clients send it.
_ROLES = {
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
}
REDACTED = "[thinking redacted]"


def anthropic_messages(
    fields: Fields, signatures: Signatures, deferred: Mapping[str, Any] | None = None
) -> tuple[Message, ...]:
    """System text comes first, then the turns. A turn with tool results becomes one message per result.
    deferred: tools that are shown to the model where a result refers to them.

    Raises:  WrongField: a block of an unknown kind; the field is named.
    """
    found = MessageList()
    if fields.has("system"):
        said = content_of(fields, "system")
        if said.text:
            starts = tuple(said.part_starts)
            found.add(
                Message(
                    role=ChatRole.SYSTEM, content=said.text, breakpoints=tuple(said.breakpoints), part_starts=starts
                )
            )
    items = fields.children("messages")
    if not items:
        raise wrong_value("messages", " is empty")
    for item in items:
        role = item.one_of("role", _ROLES)
        blocks = _blocks(item)
        if role is ChatRole.ASSISTANT:
            found.add(_Answer(blocks, signatures).message(end_breakpoint(item)))
        else:
            _read_turn(blocks, role, found, end_breakpoint(item), deferred or {})
    return found.finish(fields.notes)


def _blocks(item: Fields) -> list[Fields]:
    value = item.take("content")
    where = item.name_of("content")
    if value is None:
        raise missing(where, "a string or a list of blocks")
    if isinstance(value, str):
        return [Fields({"type": "text", "text": value}, where)]
    if not isinstance(value, list):
        raise wrong_type(where, "a string or a list of blocks")
    return [item.inside(block, f"{where}[{index}]") for index, block in enumerate(value)]


def _read_turn(
    blocks: list[Fields],
    role: ChatRole,
    found: MessageList,
    ends: tuple[TextBreakpoint, ...],
    deferred: Mapping[str, Any],
) -> None:
    """Read tool results, then the rest of the user's message."""
    said, has_results = Content(), False
    for block in blocks:
        if not block.takes("type", "tool_result"):
            said.add_part(block)
            continue
        has_results = True
        result = result_of(block, "content", deferred)
        if block.boolean("is_error"):
            # A failed call is described in words, because the model's format has no field for it.
            result.prepend("Error: ")
        breakpoints = (*result.breakpoints, *end_breakpoint(block))
        call_id = block.text("tool_use_id", "")
        message = Message(role=ChatRole.TOOL, content=result.text, tool_call_id=call_id, breakpoints=breakpoints)
        found.add(message, result.unseen)
    if said.text or not has_results:
        found.add(Message(role=role, content=said.text, breakpoints=(*said.breakpoints, *ends)), said.unseen)
    elif ends:
        found.end_with(ends)


class _Answer:
    """An assistant's turn while its blocks are read."""

    def __init__(self, blocks: list[Fields], signatures: Signatures) -> None:
        self._said = Content()
        self._reasoning = ""
        self._calls: list[ToolCall] = []
        self._ends: list[TextBreakpoint] = []
        self._signatures = signatures
        readers: dict[str, Callable[[Fields], None]] = {
            "thinking": self._thinking,
            "redacted_thinking": self._redacted,
            "tool_use": self._tool_use,
        }
        for block in blocks:
            kind = next((each for each in readers if block.takes("type", each)), None)
            (self._other if kind is None else readers[kind])(block)

    def message(self, ends: tuple[TextBreakpoint, ...]) -> Message:
        return Message(
            role=ChatRole.ASSISTANT,
            content=self._said.text,
            reasoning=self._reasoning,
            tool_calls=tuple(self._calls),
            breakpoints=(*self._said.breakpoints, *self._ends, *ends),
        )

    def _thinking(self, block: Fields) -> None:
        text = block.text("thinking", "")
        if not self._signatures.is_ours(text, block.text("signature", "")):
            block.notes.call_foreign(block.where)
        self._reasoning += text
        self._said.add("", breakpoint_ttl(block))

    def _redacted(self, block: Fields) -> None:
        block.drop("data")
        block.notes.call_foreign(block.where)
        self._reasoning += REDACTED

    def _tool_use(self, block: Fields) -> None:
        value = block.take("input", {})
        arguments = value if isinstance(value, str) else as_json(value)
        self._calls.append(ToolCall(id=block.text("id", ""), name=block.text("name"), arguments=arguments))
        block.drop("caller")
        self._ends += end_breakpoint(block)

    def _other(self, block: Fields) -> None:
        """Text, or a short note about another provider's own tools, so that the model knows that they ran."""
        kind = block.take("type", "")
        if not isinstance(kind, str) or not kind.endswith(("tool_use", "tool_result")):
            self._said.add_part(block, kind)
            return
        block.notes.leave_out(block.where, kind)
        if kind.endswith("tool_use"):
            self._said.add(f"[{block.text('name', kind)} called with {as_json(block.take('input', {}))}]")
        else:
            self._said.add(f"[{kind}: not shown]")
        block.drop_rest()


def read_context_management(fields: Fields) -> None:
    """Read `context_management`. Edits that only save context have no effect here, because the model's format has its
    own rule for old thinking.

    Raises:  WrongField: an edit removes content.
    """
    management = fields.child("context_management")
    if management is None:
        return
    for edit in management.children("edits", []):
        kind = edit.text("type")
        if not kind.startswith("clear_thinking"):
            raise unsupported(edit.name_of("type"), f": {kind[:80]!r} takes content out of the conversation")
        edit.drop("keep")
        fields.notes.ignore(edit.where)


def user_of(fields: Fields) -> str:
    """`metadata.user_id`: the user whose cache is used."""
    metadata = fields.child("metadata")
    return "" if metadata is None else metadata.text("user_id", "")


def call_input(call: ToolCall) -> Any:
    return as_text(json.loads(call.arguments or "{}"))
