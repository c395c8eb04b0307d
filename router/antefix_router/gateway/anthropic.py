"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from antefix.restore_report import RestoreReport
from antefix.usage import Usage
from antefix_billing.providers import messages_usage
from antefix_router.chat.messages import CallDelta, ChatRole, Conversation, Delta, Effort
from antefix_router.front import cache_tenant
from antefix_router.gateway.access import CLIENT_GONE
from antefix_router.gateway.answer_form import ANTHROPIC_NAMES, flat_form
from antefix_router.gateway.anthropic_messages import anthropic_messages, call_input, read_context_management, user_of
from antefix_router.gateway.content import end_conversation
from antefix_router.gateway.fields import Fields, missing
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import error_event, event_bytes
from antefix_router.gateway.http_errors import Provider, error_response
from antefix_router.gateway.knobs import Knobs, read_knobs
from antefix_router.gateway.modes import read_wish
from antefix_router.gateway.openai_messages import refuse_unsupported
from antefix_router.gateway.output import Ended, Output
from antefix_router.gateway.signatures import Signatures
from antefix_router.gateway.tools import anthropic_tools
from antefix_router.gateway.user_names import split_user

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request of Anthropic's API after its fields were read."""

    model: str
    user: str
    stream: bool
    knobs: Knobs
    conversation: Conversation


async def prepare_messages(gateway: Gateway, request: Request) -> MessagesCall:
    """Read and admit a request.  Raises:  InvalidRequest and the other errors that `Gateway.chat` raises."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    asked = _read(gateway, fields, tenant)
    if asked.knobs.max_tokens is None:
        raise missing("max_tokens", "an integer of at least 1")  # as in Anthropic's API, which has no default
    caller = gateway.caller(request, tenant, asked.user)
    output = await gateway.chat(asked.conversation, asked.knobs, caller, fields.notes, ANTHROPIC_NAMES)
    return MessagesCall(
        output,
        asked.model,
        gateway.config.http_timeout_s,
        stream=asked.stream,
        signatures=gateway.signatures(tenant),
        headers=fields.notes.headers(),
    )


async def count_tokens(gateway: Gateway, request: Request) -> JSONResponse:
    """The length of a request's prompt, without running the request. Accepts whatever `prepare_messages` accepts."""
    try:
        with gateway.entering(request):
            tenant = gateway.tenant(request)
            fields = await gateway.fields(request)
            asked = _read(gateway, fields, tenant)
            tenant = cache_tenant(tenant, split_user(asked.user).user)
            rendered = await gateway.render(asked.conversation, tenant, fields.notes)
    except ClientDisconnect:
        return JSONResponse({}, status_code=CLIENT_GONE)
    except Exception as err:  # noqa: BLE001 - answered in the caller's shape
        return error_response(err, Provider.ANTHROPIC)
    return JSONResponse({"input_tokens": len(rendered.tokens)}, headers=fields.notes.headers())


def _read(gateway: Gateway, fields: Fields, tenant: str) -> _Asked:
    model = gateway.model(fields)
    stream = fields.boolean("stream")
    user = user_of(fields)
    knobs = read_knobs(fields, "max_tokens", stop_name="stop_sequences")
    config = fields.child("output_config")
    effort = gateway.choose_effort(read_wish(fields, config), model, Effort.NONE, fields.notes)
    # Earlier versions of the API had this field on the top level.
    early, late = fields.child("output_format"), None if config is None else config.child("format")
    form = flat_form(early if late is None else late)
    tools = anthropic_tools(fields)
    messages = anthropic_messages(fields, gateway.signatures(tenant), tools.deferred)
    messages = end_conversation(messages, fields)
    read_context_management(fields)
    if servers := fields.items("mcp_servers", []):
        fields.notes.leave_out("mcp_servers", f"{len(servers)} servers")
    refuse_unsupported(fields)
    fields.close()
    fields.notes.close()
    conversation = Conversation(
        messages=messages,
        tools=tools.schemas,
        deferred=frozenset(tools.deferred),
        strict=tools.strict,
        tool_rule=tools.rule,
        tools_breakpoint=tools.breakpoint,
        answers_json=form.is_json,
        response_schema=form.schema,
        effort=effort,
        continue_last=messages[-1].role is ChatRole.ASSISTANT,
    )
    conversation = gateway.settled(conversation, fields.notes)
    return _Asked(model=model.asked_for, user=user, stream=stream, knobs=knobs, conversation=conversation)


class MessagesCall:
    """One answer in the forms of Anthropic's API."""

    def __init__(
        self,
        output: Output,
        model: str,
        timeout_s: float,
        *,
        stream: bool,
        signatures: Signatures,
        headers: dict[str, str],
    ) -> None:
        self.stream = stream
        self.headers = {"request-id": output.request_id, **headers}
        self._signatures = signatures
        self._output = output
        self._model = model
        self._timeout_s = timeout_s

    async def whole(self) -> dict[str, Any]:
        async for _ in self._output.deltas(self._timeout_s, held=True):
            pass
        ended, output = self._output.ended(), self._output
        self.headers |= ended.headers
        content: list[dict[str, Any]] = []
        if output.reasoning:
            signature = self._signatures.sign(output.reasoning)
            content.append({"type": "thinking", "thinking": output.reasoning, "signature": signature})
        if output.content or not output.tool_calls:
            content.append({"type": "text", "text": output.content})
        for call in output.tool_calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call_input(call)})
        return {
            **self._message(content),
            "stop_reason": _stop_reason(ended),
            "stop_sequence": ended.stop,
            "usage": ended.usage(messages_usage),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        blocks = _Blocks(self._signatures)
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
        yield _event("message_delta", delta=delta_json, usage=ended.usage(messages_usage))
        yield _event("message_stop")

    def failed(self, err: Exception) -> bytes:
        return error_event(err, Provider.ANTHROPIC)

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
    """Opens content blocks one after the other: thinking, then text, then one block per call. Thinking ends with its
    signature, because clients do not keep thinking without a signature.
    """

    def __init__(self, signatures: Signatures) -> None:
        self._signatures = signatures
        self._index = -1
        self._open = ""
        self._thinking = ""

    def push(self, delta: Delta) -> list[bytes]:
        if delta.call is not None:
            return self._push_call(delta.call)
        if delta.reasoning:
            events = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self._thinking += delta.reasoning
            return [*events, self._delta({"type": "thinking_delta", "thinking": delta.reasoning})]
        events = self._begin("text", {"type": "text", "text": ""})
        return [*events, self._delta({"type": "text_delta", "text": delta.content})]

    def _push_call(self, call: CallDelta) -> list[bytes]:
        events = self._begin(call.id, {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def finish(self) -> list[bytes]:
        events = self._begin("text", {"type": "text", "text": ""}) if self._index < 0 else []
        return [*events, *self._end()]

    def _begin(self, what: str, block: dict[str, Any]) -> list[bytes]:
        """what: the kind of content block, or the call."""
        if self._open == what:
            return []
        events = self._end() if self._open else []
        self._index, self._open = self._index + 1, what
        return [*events, _event("content_block_start", index=self._index, content_block=block)]

    def _end(self) -> list[bytes]:
        events = [_event("content_block_stop", index=self._index)]
        if self._open == "thinking":
            signature = self._signatures.sign(self._thinking)
            events.insert(0, self._delta({"type": "signature_delta", "signature": signature}))
            self._thinking = ""
        return events

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **values: Any) -> bytes:
    return event_bytes({"type": kind, **values}, name=kind)


def _stop_reason(ended: Ended) -> str:
    return "stop_sequence" if ended.stop is not None else _STOP_REASONS[ended.reason]


def _usage_so_far(report: RestoreReport | None, num_prompt_tokens: int) -> dict[str, Any]:
    """The usage at the start: the prompt's counts by the same rule as at the end, and no output yet."""
    return messages_usage(Usage(prompt_tokens=num_prompt_tokens) if report is None else report.usage(num_prompt_tokens))
