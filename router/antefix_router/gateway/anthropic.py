"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from antefix.restore_report import RestoreReport
from antefix_billing.providers import messages_usage
from antefix_router.chat.messages import Conversation, Delta, Role
from antefix_router.front import cache_tenant
from antefix_router.gateway.answer_form import ANTHROPIC_NAMES, flat_form
from antefix_router.gateway.anthropic_messages import (
    anthropic_effort,
    anthropic_messages,
    anthropic_tools,
    call_input,
    top_level_cache_control,
    user_of,
)
from antefix_router.gateway.fields import Fields, missing
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import event_bytes
from antefix_router.gateway.http_errors import Provider, error_response
from antefix_router.gateway.knobs import read_knobs
from antefix_router.gateway.output import Ended, Output

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def prepare_messages(gateway: Gateway, request: Request) -> MessagesCall:
    """Raises:  InvalidRequest and the others of `Gateway.chat`."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.check_model(fields.text("model"))
    max_tokens = fields.integer("max_tokens", low=1)
    if max_tokens is None:
        raise missing("max_tokens", "an integer of at least 1")  # as in Anthropic's API, which has no default
    stream = fields.boolean("stream")
    user = user_of(fields.take("metadata"))
    knobs = replace(read_knobs(fields, stop_name="stop_sequences"), max_tokens=max_tokens)
    fields.only("service_tier", lambda value: value in ("auto", "standard_only"), "there is one tier")
    conversation = _conversation(gateway, fields)
    output = await gateway.chat(conversation, knobs, gateway.caller(request, tenant, user), ANTHROPIC_NAMES)
    return MessagesCall(output, model, gateway.config.http_timeout_s, stream=stream)


async def count_tokens(gateway: Gateway, request: Request) -> JSONResponse:
    """The prompt's length, without running it."""
    try:
        tenant = gateway.tenant(request)
        fields = await gateway.fields(request)
        gateway.check_model(fields.text("model"))
        fields.drop("max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream")
        tokens, _ = await gateway.tokens_of(_conversation(gateway, fields), cache_tenant(tenant, ""))
    except Exception as err:  # noqa: BLE001 - answered in the caller's shape
        return error_response(err, Provider.ANTHROPIC)
    return JSONResponse({"input_tokens": len(tokens)})


def _conversation(gateway: Gateway, fields: Fields) -> Conversation:
    config = Fields(fields.take("output_config", {}), "output_config")
    effort = gateway.check_effort(anthropic_effort(fields, config))
    form = flat_form(config.take("format"), "output_config.format")
    config.refuse_rest()
    tools, tools_break_s = anthropic_tools(fields)
    messages = anthropic_messages(fields.take("system"), fields.items("messages"))
    messages = top_level_cache_control(messages, fields.take("cache_control"))
    fields.refuse_rest()
    return Conversation(
        messages=messages,
        tools=tools.schemas,
        strict=tools.strict,
        tool_rule=tools.rule,
        answers_json=form.is_json,
        response_schema=form.schema,
        tools_break_s=tools_break_s,
        effort=effort,
        continue_last=messages[-1].role is Role.ASSISTANT,
    )


class MessagesCall:
    """One answer in Anthropic's shapes."""

    def __init__(self, output: Output, model: str, timeout_s: float, *, stream: bool) -> None:
        self.stream = stream
        self.headers = {"request-id": output.request_id}
        self._output = output
        self._model = model
        self._timeout_s = timeout_s

    async def whole(self) -> dict[str, Any]:
        async for _ in self._output.deltas(self._timeout_s, held=True):
            pass
        ended, output = self._output.ended(), self._output
        content: list[dict[str, Any]] = []
        if output.reasoning:
            content.append({"type": "thinking", "thinking": output.reasoning, "signature": ""})
        if output.content or not output.tool_calls:
            content.append({"type": "text", "text": output.content})
        for call in output.tool_calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call_input(call)})
        return {
            **self._message(content),
            "stop_reason": _stop_reason(ended),
            "stop_sequence": ended.stop,
            "usage": messages_usage(ended.record),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        blocks = _Blocks()
        started = False
        async for delta in self._output.deltas(self._timeout_s):
            if not started:
                yield self._start()
                started = True
            for event in blocks.push(delta):
                yield event
        if not started:
            yield self._start()
        for event in blocks.finish():
            yield event
        ended = self._output.ended()
        delta_json = {"stop_reason": _stop_reason(ended), "stop_sequence": ended.stop}
        yield _event("message_delta", delta=delta_json, usage=messages_usage(ended.record))
        yield _event("message_stop")

    def _start(self) -> bytes:
        usage = _usage_so_far(self._output.restore, self._output.num_prompt_tokens)
        message = {**self._message([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        return _event("message_start", message=message)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._output.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
        }


class _Blocks:
    """Content blocks open one after the other: thinking, text, then one for each call."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""

    def push(self, delta: Delta) -> list[bytes]:
        if delta.tool_call is not None:
            call = delta.tool_call
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            events = self._begin("tool_use", block, anew=True)
            return [*events, self._delta({"type": "input_json_delta", "partial_json": call.arguments})]
        if delta.reasoning:
            events = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return [*events, self._delta({"type": "thinking_delta", "thinking": delta.reasoning})]
        events = self._begin("text", {"type": "text", "text": ""})
        return [*events, self._delta({"type": "text_delta", "text": delta.content})]

    def finish(self) -> list[bytes]:
        events = self._begin("text", {"type": "text", "text": ""}) if self._index < 0 else []
        return [*events, _event("content_block_stop", index=self._index)]

    def _begin(self, kind: str, block: dict[str, Any], *, anew: bool = False) -> list[bytes]:
        if self._open == kind and not anew:
            return []
        events = [_event("content_block_stop", index=self._index)] if self._open else []
        self._index, self._open = self._index + 1, kind
        return [*events, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **values: Any) -> bytes:
    return event_bytes({"type": kind, **values}, name=kind)


def _stop_reason(ended: Ended) -> str:
    return "stop_sequence" if ended.stop is not None else _STOP_REASONS[ended.reason]


def _usage_so_far(report: RestoreReport | None, num_prompt_tokens: int) -> dict[str, Any]:
    """At the start: the prompt's counts by the same rule as at the end, and no output yet."""
    hit = report.hit_tokens if report else 0
    written = min(report.written_tokens, num_prompt_tokens - hit) if report else 0
    return {
        "input_tokens": num_prompt_tokens - hit - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": hit,
        "cache_creation": {"ephemeral_5m_input_tokens": written, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 0,
    }
