"""OpenAI's /v1/chat/completions, with DeepSeek's fields beside them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from antefix.errors import InvalidRequest
from antefix_billing.providers import chat_usage
from antefix_router.chat.messages import Conversation, Delta, Effort, Role, ToolCall
from antefix_router.gateway.answer_form import chat_form
from antefix_router.gateway.choices import Choices
from antefix_router.gateway.fields import Fields, unsupported
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import event_bytes
from antefix_router.gateway.knobs import read_knobs
from antefix_router.gateway.openai_messages import EFFORTS, chat_messages, chat_tools, refuse_unsupported
from antefix_router.gateway.output import Output


async def prepare_chat(gateway: Gateway, request: Request) -> ChatCall:
    """Raises:  InvalidRequest and the others of `Gateway.chat`."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.check_model(fields.text("model"))
    stream, include_usage = stream_options(fields)
    user = fields.text("user", "") or fields.text("user_id", "")
    effort = gateway.check_effort(_effort(fields))
    raw = fields.items("messages")
    messages = chat_messages(raw)
    tools = chat_tools(fields)
    num_top = _num_top_logprobs(fields)
    knobs = read_knobs(fields, "max_completion_tokens", "max_tokens", num_top_logprobs=num_top, several=True)
    form = chat_form(fields.take("response_format"))
    session = fields.text("prompt_cache_key", "")
    refuse_unsupported(fields)
    fields.refuse_rest()
    # DeepSeek's prefix completion: the last message is an answer that was begun.
    begun = messages[-1].role is Role.ASSISTANT
    if begun and not raw[-1].get("prefix"):
        raise InvalidRequest('the last message is the assistant\'s; say "prefix": true in it to have it gone on with')
    conversation = Conversation(
        messages=messages,
        tools=tools.schemas,
        strict=tools.strict,
        tool_rule=tools.rule,
        effort=effort,
        continue_last=begun,
        answers_json=form.is_json,
        response_schema=form.schema,
    )
    choices = await gateway.chat_choices(conversation, knobs, gateway.caller(request, tenant, user, session=session))
    return ChatCall(choices, model, gateway.config.http_timeout_s, stream=stream, include_usage=include_usage)


def stream_options(fields: Fields) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = fields.boolean("stream")
    options = Fields(fields.take("stream_options", {}), "stream_options")
    include_usage = options.boolean("include_usage")
    options.only("include_obfuscation", lambda value: value is False, "obfuscation is not supported")
    options.refuse_rest()
    return stream, include_usage


def _num_top_logprobs(fields: Fields) -> int | None:
    is_wanted = fields.boolean("logprobs")
    num_top = fields.integer("top_logprobs")
    if num_top and not is_wanted:
        raise unsupported("top_logprobs", " needs logprobs to be true")
    return (num_top or 0) if is_wanted else None


def _effort(fields: Fields) -> Effort | None:
    """OpenAI's reasoning_effort and DeepSeek's thinking switch; None: neither was given."""
    effort: Effort | None = fields.one_of("reasoning_effort", EFFORTS, None)
    thinking = fields.take("thinking")
    if thinking is None:
        return effort
    options = Fields(thinking, "thinking")
    enabled = options.one_of("type", {"enabled": True, "disabled": False}, True)
    options.refuse_rest()
    return (effort or Effort.HIGH) if enabled else Effort.NONE


class ChatCall:
    """One answer, or several, in OpenAI's shapes."""

    def __init__(self, choices: Choices, model: str, timeout_s: float, *, stream: bool, include_usage: bool) -> None:
        self.stream = stream
        self.headers = {"x-request-id": choices.request_id}
        self._choices = choices
        self._model = model
        self._timeout_s = timeout_s
        self._include_usage = include_usage
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        async for _ in self._choices.deltas(self._timeout_s, held=True):
            pass
        shown = self._choices.shown
        choices = [_choice(index, output) for index, output in enumerate(shown)]
        usage = chat_usage(shown[0].ended().record)
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        num_calls: dict[int, int] = {}
        async for index, delta in self._choices.deltas(self._timeout_s):
            if index not in num_calls:
                yield self._chunk(index, {"role": "assistant", "content": ""})
                num_calls[index] = 0
            # Asked for now: of the best outputs it is not known before which they are.
            logprobs = _logprobs(self._choices.shown[index])
            yield self._chunk(index, _delta_json(delta, num_calls[index]), logprobs=logprobs)
            num_calls[index] += delta.tool_call is not None
        shown = self._choices.shown
        for index, output in enumerate(shown):
            if index not in num_calls:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            yield self._chunk(index, {}, finish_reason=output.ended().reason, logprobs=_logprobs(output))
        if self._include_usage:
            usage = chat_usage(shown[0].ended().record)
            yield event_bytes({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield event_bytes("[DONE]")

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        # With include_usage every chunk has the field; clients that do not ask never see it.
        return event_bytes({**chunk, "usage": None} if self._include_usage else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._choices.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._model,
        }


def _choice(index: int, output: Output) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": output.content, "refusal": None}
    if output.reasoning:
        message["reasoning_content"] = output.reasoning
    if output.tool_calls:
        message["tool_calls"] = [_call_json(call) for call in output.tool_calls]
        message["content"] = output.content or None
    reason = output.ended().reason
    return {"index": index, "message": message, "logprobs": _logprobs(output), "finish_reason": reason}


def _logprobs(output: Output) -> dict[str, Any] | None:
    return output.logprobs.chat(output.new_logprobs())


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta_json(delta: Delta, num_calls: int) -> dict[str, Any]:
    if delta.tool_call is not None:
        return {"tool_calls": [{"index": num_calls, **_call_json(delta.tool_call)}]}
    return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}
