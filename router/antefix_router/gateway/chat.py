"""OpenAI's /v1/chat/completions, with DeepSeek's fields beside them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from antefix.errors import InvalidRequest
from antefix_billing.providers import chat_usage
from antefix_router.chat.messages import CallDelta, Conversation, Delta, Effort, Role, ToolCall
from antefix_router.gateway.content import end_conversation
from antefix_router.gateway.fields import Fields, unsupported
from antefix_router.gateway.gateway import Gateway, Knobs
from antefix_router.gateway.http import error_event, event_bytes
from antefix_router.gateway.http_errors import Provider
from antefix_router.gateway.modes import read_wish
from antefix_router.gateway.openai_messages import chat_messages, refuse_unsupported
from antefix_router.gateway.output import Output
from antefix_router.gateway.tools import openai_tools


async def prepare_chat(gateway: Gateway, request: Request) -> ChatCall:
    """Raises:  InvalidRequest and the others of `Gateway.chat`."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.model(fields)
    stream, include_usage = stream_options(fields)
    user = fields.text("user", "") or fields.text("user_id", "")
    effort = gateway.choose_effort(read_wish(fields), model, Effort.HIGH, fields.notes)
    messages, begun = chat_messages(fields)
    messages = end_conversation(messages, fields)
    tools = openai_tools(fields)
    knobs = sampling_knobs(fields, "max_completion_tokens", "max_tokens", num_top_logprobs=_num_top_logprobs(fields))
    _response_format(fields)
    session = fields.text("prompt_cache_key", "")
    refuse_unsupported(fields)
    # DeepSeek's prefix completion: the last message is an answer that was begun.
    is_answer = messages[-1].role is Role.ASSISTANT
    if is_answer and not begun:
        raise InvalidRequest('the last message is the assistant\'s; say "prefix": true in it to have it gone on with')
    fields.close()
    fields.notes.close()
    conversation = Conversation(
        messages=messages,
        tools=tools.schemas,
        strict=tools.strict,
        tools_breakpoint=tools.breakpoint,
        effort=effort,
        continue_last=is_answer,
    )
    output = await gateway.chat(
        conversation, knobs, gateway.caller(request, tenant, user, session=session), fields.notes
    )
    return ChatCall(
        output,
        model.asked_for,
        gateway.config.http_timeout_s,
        stream=stream,
        include_usage=include_usage,
        headers=fields.notes.headers(),
    )


def stream_options(fields: Fields) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = fields.boolean("stream")
    options = fields.child("stream_options")
    return stream, options is not None and options.boolean("include_usage")


def sampling_knobs(fields: Fields, *length_names: str, num_top_logprobs: int | None) -> Knobs:
    """Raises:  InvalidRequest: of a wrong type; values out of range are refused with the sampling."""
    lengths = [fields.integer(name, low=1) for name in length_names]
    return Knobs(
        max_tokens=next((length for length in lengths if length is not None), None),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        seed=fields.integer("seed", low=-(2**63)),
        stop=tuple(fields.texts("stop")),
        num_top_logprobs=num_top_logprobs,
    )


def _num_top_logprobs(fields: Fields) -> int | None:
    is_wanted = fields.boolean("logprobs")
    num_top = fields.integer("top_logprobs")
    if num_top and not is_wanted:
        raise unsupported("top_logprobs", " needs logprobs to be true")
    return (num_top or 0) if is_wanted else None


def _response_format(fields: Fields) -> None:
    wanted = fields.child("response_format")
    if wanted is not None and wanted.text("type") != "text":
        raise unsupported("response_format", ": output is not forced into a format here; only 'text' is supported")


class ChatCall:
    """One answer in OpenAI's shapes."""

    def __init__(
        self,
        output: Output,
        model: str,
        timeout_s: float,
        *,
        stream: bool,
        include_usage: bool,
        headers: dict[str, str],
    ) -> None:
        self.stream = stream
        self.headers = {"x-request-id": output.request_id, **headers}
        self._output = output
        self._model = model
        self._timeout_s = timeout_s
        self._include_usage = include_usage
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        async for _ in self._output.deltas(self._timeout_s, held=True):
            pass
        ended = self._output.ended()
        message: dict[str, Any] = {"role": "assistant", "content": self._output.content, "refusal": None}
        if self._output.reasoning:
            message["reasoning_content"] = self._output.reasoning
        if self._output.tool_calls:
            message["tool_calls"] = [_call_json(call) for call in self._output.tool_calls]
            message["content"] = self._output.content or None
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(), "finish_reason": ended.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": chat_usage(ended.record)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        call_ids: list[str] = []
        opened = False
        async for delta in self._output.deltas(self._timeout_s):
            if not opened:
                yield self._chunk({"role": "assistant", "content": ""})
                opened = True
            if (piece := _delta_json(delta, call_ids)) is not None:
                yield self._chunk(piece, logprobs=self._logprobs())
        if not opened:
            yield self._chunk({"role": "assistant", "content": ""})
        ended = self._output.ended()
        yield self._chunk({}, finish_reason=ended.reason, logprobs=self._logprobs())
        if self._include_usage:
            yield event_bytes({**self._head("chat.completion.chunk"), "choices": [], "usage": chat_usage(ended.record)})
        yield event_bytes("[DONE]")

    def failed(self, err: Exception) -> bytes:
        return error_event(err, Provider.OPENAI)

    def _logprobs(self) -> dict[str, Any] | None:
        return self._output.logprobs.chat(self._output.new_logprobs())

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        # With include_usage every chunk has the field; clients that do not ask never see it.
        return event_bytes({**chunk, "usage": None} if self._include_usage else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._output.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._model,
        }


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta_json(delta: Delta, call_ids: list[str]) -> dict[str, Any] | None:
    """call_ids: the calls so far, in order; grown here. None: nothing that this API has words for."""
    if delta.call is None:
        return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}
    call = delta.call
    if call.id not in call_ids:
        call_ids.append(call.id)
        return {"tool_calls": [{"index": len(call_ids) - 1, **_call_json(_begun(call))}]}
    piece = {"index": call_ids.index(call.id), "function": {"arguments": call.arguments}}
    return {"tool_calls": [piece]} if call.arguments else None


def _begun(call: CallDelta) -> ToolCall:
    return ToolCall(id=call.id, name=call.name, arguments=call.arguments)
