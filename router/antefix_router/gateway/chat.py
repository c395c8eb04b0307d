"""OpenAI's /v1/chat/completions, together with DeepSeek's fields."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

from starlette.requests import Request

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import CallDelta, ChatRole, Conversation, Delta, Effort, ToolCall
from antefix_router.gateway.answer_form import chat_form
from antefix_router.gateway.choices_call import ChoicesCall
from antefix_router.gateway.content import end_conversation, retained
from antefix_router.gateway.fields import Fields, unsupported
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import event_bytes
from antefix_router.gateway.knobs import read_knobs
from antefix_router.gateway.modes import read_wish
from antefix_router.gateway.openai_messages import chat_messages, refuse_unsupported
from antefix_router.gateway.output import Output
from antefix_router.gateway.tools import openai_tools

_CHUNK: Final = "chat.completion.chunk"


async def prepare_chat(gateway: Gateway, request: Request) -> ChatCall:
    """Read and admit a request.  Raises:  InvalidRequest and the other errors that `Gateway.chat` raises."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.model(fields)
    stream, include_usage = stream_options(fields)
    user = fields.text("user", "") or fields.text("user_id", "")
    effort = gateway.choose_effort(read_wish(fields), model, Effort.HIGH, fields.notes)
    messages, begun = chat_messages(fields)
    messages = retained(end_conversation(messages, fields), fields)
    tools = openai_tools(fields)
    num_top = _num_top_logprobs(fields)
    knobs = read_knobs(fields, "max_completion_tokens", "max_tokens", num_top_logprobs=num_top, several=True)
    form = chat_form(fields)
    session = fields.text("prompt_cache_key", "")
    refuse_unsupported(fields)
    # DeepSeek's prefix completion: the last message is the beginning of the answer.
    is_answer = messages[-1].role is ChatRole.ASSISTANT
    if is_answer and not begun:
        raise InvalidRequest(
            'the last message is from the assistant; to continue that message, set "prefix": true in it'
        )
    fields.close()
    fields.notes.close()
    conversation = Conversation(
        messages=messages,
        tools=tools.schemas,
        strict=tools.strict,
        tool_rule=tools.rule,
        tools_breakpoint=tools.breakpoint,
        effort=effort,
        continue_last=is_answer,
        answers_json=form.is_json,
        response_schema=form.schema,
    )
    conversation = gateway.settled(conversation, fields.notes)
    caller = gateway.caller(request, tenant, user, session=session)
    choices = await gateway.chat_choices(conversation, knobs, caller, fields.notes)
    return ChatCall(
        choices,
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


def _num_top_logprobs(fields: Fields) -> int | None:
    is_wanted = fields.boolean("logprobs")
    num_top = fields.integer("top_logprobs")
    if num_top and not is_wanted:
        raise unsupported("top_logprobs", " needs logprobs to be true")
    return (num_top or 0) if is_wanted else None


class ChatCall(ChoicesCall):
    """One answer, or several, in the form of chat completions."""

    kind = "chat.completion"
    id_prefix = "chatcmpl"

    async def events(self) -> AsyncGenerator[bytes, None]:
        call_ids: dict[int, list[str]] = {}
        async for index, delta in self._choices.deltas(self._timeout_s):
            if index not in call_ids:
                yield self._chunk(index, {"role": "assistant", "content": ""})
                call_ids[index] = []
            if (piece := _delta_json(delta, call_ids[index])) is not None:
                # Read the log probabilities now: with `best_of`, the outputs to show are known only at the end.
                yield self._chunk(index, piece, logprobs=_logprobs(self._choices.shown[index]))
        shown = self._choices.shown
        for index, output in enumerate(shown):
            if index not in call_ids:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            yield self._chunk(index, {}, finish_reason=output.ended().reason, logprobs=_logprobs(output))
        if self._include_usage:
            yield self._event(_CHUNK, [], usage=self._usage())
        yield event_bytes("[DONE]")

    def _whole_choice(self, index: int, output: Output) -> dict[str, Any]:
        return _choice(index, output)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        # With include_usage every chunk has the field. Clients that do not ask for usage never see it.
        return self._event(_CHUNK, [choice], **({"usage": None} if self._include_usage else {}))


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


def _delta_json(delta: Delta, call_ids: list[str]) -> dict[str, Any] | None:
    """call_ids: the ids of the calls so far, in order; extended here. Returns None if this API cannot express the
    delta.
    """
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
