"""Converts OpenAI's chat messages, with the additions of DeepSeek and others, into a conversation. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from antefix_router.chat.messages import ChatRole, Message, TextBreakpoint, ToolCall
from antefix_router.gateway.content import MessageList, as_json, content_of, end_breakpoint, result_of
from antefix_router.gateway.fields import Fields, is_number, wrong_value

_ROLES = {
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "tool": ChatRole.TOOL,
    "function": ChatRole.TOOL,  # before there were tools
}


def chat_messages(fields: Fields) -> tuple[tuple[Message, ...], bool]:
    """The messages, and whether the last one is the beginning of an answer that is to be continued.

    Raises:  WrongField: a message has an unknown form; the field is named.
    """
    items = fields.children("messages")
    if not items:
        raise wrong_value("messages", " is empty")
    found, begun = MessageList(), False
    for item in items:
        begun = item.take("prefix") is True
        _read_message(item, found)
    return found.finish(fields.notes), begun


def _read_message(item: Fields, found: MessageList) -> None:
    role = item.one_of("role", _ROLES)
    # An assistant's message with calls may have no content, and a tool's result may be empty. Every other message needs
    # content.
    silent = "" if role is ChatRole.ASSISTANT else None
    said = result_of(item, "content") if role is ChatRole.TOOL else content_of(item, "content", silent)
    calls: tuple[ToolCall, ...] = ()
    ends: tuple[TextBreakpoint, ...] = ()
    call_id = reasoning = name = ""
    if role is ChatRole.ASSISTANT:
        said.text = said.text or item.text("refusal", "")
        calls, ends = _calls(item)
        reasoning = _reasoning(item)
        item.drop("refusal", "annotations", "audio")
    if role is ChatRole.TOOL:
        call_id = item.text("tool_call_id", "")
        item.drop("name")  # the function's name, which the call already has
    else:
        name = item.text("name", "")
    message = Message(
        role=role,
        content=said.text,
        name=name,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=call_id,
        breakpoints=(*said.breakpoints, *ends, *end_breakpoint(item)),
        part_starts=tuple(said.part_starts),
    )
    found.add(message, said.unseen)


def _reasoning(item: Fields) -> str:
    """DeepSeek's field for reasoning, or the field that another kind of server uses. The details hold the same text in
    parts.
    """
    text = item.text("reasoning_content", "")
    # Some servers send the same text under several names.
    other = item.take("reasoning", "")
    details = _details(item)
    return text or (other if isinstance(other, str) else "") or details


def _details(item: Fields) -> str:
    texts = []
    for part in item.children("reasoning_details", []):
        texts.append(part.take("text") or part.take("summary") or "")
        part.drop("id", "type", "format", "index", "signature", "data", "text", "summary")
    return "".join(text for text in texts if isinstance(text, str))


def _calls(item: Fields) -> tuple[tuple[ToolCall, ...], tuple[TextBreakpoint, ...]]:
    """The tool calls of a message, and the breakpoints on them. Calls are written as one piece, so these breakpoints
    are at the message's end.
    """
    ends: list[TextBreakpoint] = []
    calls: list[ToolCall] = []
    for call in item.children("tool_calls", []):
        ends += end_breakpoint(call)
        calls.append(_call(call))
    old = item.child("function_call")  # before there were tools
    if old is not None:
        calls.append(_function_call(old, call_id=""))
    return tuple(calls), tuple(ends)


def _call(item: Fields) -> ToolCall:
    item.drop("index")
    kind = item.text("type", "function")
    call_id = item.text("id", "")
    if kind == "custom":
        custom = item.child("custom") or item
        return ToolCall(id=call_id, name=custom.text("name"), arguments=as_json({"input": custom.text("input", "")}))
    return _function_call(item.child("function") or item, call_id)


def _function_call(function: Fields, call_id: str) -> ToolCall:
    arguments = function.take("arguments", "")
    # Some clients send the object instead of its JSON text.
    text = arguments if isinstance(arguments, str) else as_json(arguments)
    return ToolCall(id=call_id, name=function.text("name"), arguments=text)


def _is_empty(value: Any) -> bool:
    return not value


# Fields that would change the answer in ways that this model does not support, with the values that have no effect. Any
# field that is neither named here nor read elsewhere is a hint, and is ignored.
_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda value: is_number(value, 1), "one answer a request"),
    "best_of": (lambda value: is_number(value, 1), "one answer a request"),
    "length_penalty": (lambda value: is_number(value, 1), "penalties are not supported"),
    "top_a": (lambda value: is_number(value, 0), "top_a is not supported; use top_p"),
    "typical_p": (lambda value: is_number(value, 1), "typical_p is not supported; use top_p"),
    "include_stop_str_in_output": (_is_empty, "stop texts are never part of the answer"),
    "use_beam_search": (_is_empty, "there is no beam search"),
    "bad_words": (_is_empty, "output is not restricted here"),
    "allowed_token_ids": (_is_empty, "output is not restricted here"),
    "logits_processors": (_is_empty, "output is not restricted here"),
    "structured_outputs": (_is_empty, "output is not forced into a format here"),
    "guided_json": (_is_empty, "output is not forced into a format here"),
    "guided_regex": (_is_empty, "output is not forced into a format here"),
    "guided_choice": (_is_empty, "output is not forced into a format here"),
    "guided_grammar": (_is_empty, "output is not forced into a format here"),
    "prompt_logprobs": (_is_empty, "prompts have no log probabilities here"),
    "truncate_prompt_tokens": (_is_empty, "prompts are never cut"),
    "chat_template": (_is_empty, "the model's own format is used"),
    "continue_final_message": (_is_empty, 'say "prefix": true in the last message'),
    "documents": (_is_empty, "put documents into messages"),
    "functions": (_is_empty, "use tools"),
    "function_call": (lambda value: value in ("auto", "none"), "use tool_choice"),
    "modalities": (lambda value: value == ["text"], "text only"),
    # If this field were ignored, the caller would share a cache that it wants to keep separate.
    "cache_salt": (_is_empty, "use `user`: each user has a cache of its own"),
}


def refuse_unsupported(fields: Fields) -> None:
    """Raises:  WrongField: a field that would change the answer has an unsupported value."""
    for name, (allowed, why) in _UNSUPPORTED.items():
        fields.only(name, allowed, why)
    if fields.has("web_search_options"):
        fields.notes.leave_out("web_search_options", "web_search")
        fields.drop("web_search_options")
