"""OpenAI's /v1/responses, without server-side state: clients send the whole input, as agents with `store: false` do."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from antefix_billing.providers import responses_usage
from antefix_router.chat.messages import Conversation, Delta, Effort, ToolCall
from antefix_router.gateway.answer_form import RESPONSES_NAMES, AnswerForm, flat_form
from antefix_router.gateway.fields import Fields, unsupported
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import event_bytes
from antefix_router.gateway.knobs import read_knobs
from antefix_router.gateway.openai_messages import EFFORTS, refuse_unsupported
from antefix_router.gateway.output import Ended, Output
from antefix_router.gateway.responses_input import input_messages, input_tools

_LOGPROBS = "message.output_text.logprobs"


async def prepare_response(gateway: Gateway, request: Request) -> ResponsesCall:
    """Raises:  InvalidRequest and the others of `Gateway.chat`."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.check_model(fields.text("model"))
    stream = fields.boolean("stream")
    user = fields.text("user", "")
    effort = gateway.check_effort(_effort(fields.take("reasoning")))
    instructions = fields.text("instructions", "")
    messages = input_messages(instructions, fields.take("input"))
    raw_text = fields.take("text", {})
    tools = input_tools(fields)
    knobs = read_knobs(fields, "max_output_tokens", num_top_logprobs=_num_top_logprobs(fields))
    form = _form(raw_text)
    _refuse_state(fields)
    session = fields.text("prompt_cache_key", "")
    refuse_unsupported(fields)
    fields.refuse_rest()
    conversation = Conversation(
        messages=messages,
        tools=tools.tools.schemas,
        strict=tools.tools.strict,
        tool_rule=tools.tools.rule,
        effort=effort,
        answers_json=form.is_json,
        response_schema=form.schema,
    )
    caller = gateway.caller(request, tenant, user, session=session)
    output = await gateway.chat(conversation, knobs, caller, RESPONSES_NAMES)
    echo = {
        "instructions": instructions or None,
        "max_output_tokens": knobs.max_tokens,
        "temperature": knobs.temperature,
        "top_p": knobs.top_p,
        "tools": tools.raw,
        "tool_choice": tools.raw_choice,
        "parallel_tool_calls": tools.tools.rule.parallel,
        "text": raw_text or {"format": {"type": "text"}},
    }
    return ResponsesCall(output, model, gateway.config.http_timeout_s, stream=stream, echo=echo)


def _num_top_logprobs(fields: Fields) -> int | None:
    """`include` asks for them, `top_logprobs` for how many beside each."""
    wanted = fields.texts("include")
    if unknown := set(wanted) - {_LOGPROBS, "reasoning.encrypted_content"}:
        raise unsupported("include", f": {', '.join(sorted(unknown))}: nothing of that can be included")
    num_top = fields.integer("top_logprobs")
    if num_top and _LOGPROBS not in wanted:
        raise unsupported("top_logprobs", f" needs {_LOGPROBS!r} in include")
    return (num_top or 0) if _LOGPROBS in wanted else None


def _effort(value: Any) -> Effort | None:
    if value is None:
        return None
    fields = Fields(value, "reasoning")
    effort: Effort | None = fields.one_of("effort", EFFORTS, None)
    fields.drop("summary", "generate_summary")  # the reasoning is given whole
    fields.refuse_rest()
    return effort


def _form(value: Any) -> AnswerForm:
    """`text.format`."""
    text = Fields(value, "text")
    form = flat_form(text.take("format"), "text.format")
    refuse_unsupported(text)
    text.refuse_rest()
    return form


def _refuse_state(fields: Fields) -> None:
    """Nothing is kept between requests, so nothing can be referred to."""
    for name in ("previous_response_id", "conversation", "prompt", "context_management", "max_tool_calls"):
        fields.only(name, lambda value: False, "requests are stateless here: send the whole input")
    fields.only("background", lambda value: value is False, "there is no background mode")
    fields.only("truncation", lambda value: value == "disabled", "input is never cut")
    options = Fields(fields.take("stream_options", {}), "stream_options")
    options.drop("include_obfuscation")
    options.refuse_rest()


class ResponsesCall:
    """One answer in the shapes of the Responses API."""

    def __init__(self, output: Output, model: str, timeout_s: float, *, stream: bool, echo: dict[str, Any]) -> None:
        self.stream = stream
        self.headers = {"x-request-id": output.request_id}
        self._output = output
        self._model = model
        self._timeout_s = timeout_s
        self._echo = echo
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        items = _Items(self._output)
        async for delta in self._output.deltas(self._timeout_s, held=True):
            items.push(delta)
        items.finish()
        return self._response(items.done, self._output.ended())

    async def events(self) -> AsyncGenerator[bytes, None]:
        items, number, started = _Items(self._output), 0, False
        async for delta in self._output.deltas(self._timeout_s):
            opening = [] if started else self._opening()
            started = True
            for event in [*opening, *items.push(delta)]:
                yield _numbered(event, number)
                number += 1
        ended = self._output.ended()
        last = self._response(items.done, ended)
        closing = ([] if started else self._opening()) + items.finish()
        last["output"] = items.done
        kind = "response.incomplete" if ended.reason == "length" else "response.completed"
        for event in [*closing, {"type": kind, "response": last}]:
            yield _numbered(event, number)
            number += 1

    def _opening(self) -> list[dict[str, Any]]:
        response = self._response([], None)
        return [{"type": kind, "response": response} for kind in ("response.created", "response.in_progress")]

    def _response(self, items: list[dict[str, Any]], ended: Ended | None) -> dict[str, Any]:
        length = ended is not None and ended.reason == "length"
        status = "in_progress" if ended is None else "incomplete" if length else "completed"
        return {
            "id": f"resp_{self._output.request_id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if length else None,
            "model": self._model,
            "output": items,
            "store": False,
            "truncation": "disabled",
            "metadata": {},
            "usage": responses_usage(ended.record) if ended is not None else None,
            **self._echo,
        }


class _Items:
    """Output items, one after the other: reasoning, a message, calls. Gives the events of each step."""

    def __init__(self, output: Output) -> None:
        self.done: list[dict[str, Any]] = []
        self._output = output
        self._kind = ""
        self._id = ""
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        if delta.tool_call is not None:
            return [*self._close(), *self._call(delta.tool_call)]
        kind, text = ("reasoning", delta.reasoning) if delta.reasoning else ("message", delta.content)
        events = [] if kind == self._kind else [*self._close(), *self._open(kind)]
        self._text += text
        if kind == "reasoning":
            return [*events, {"type": "response.reasoning_text.delta", **self._place(), "delta": text}]
        logprobs = self._new_logprobs()
        self._logprobs += logprobs
        return [*events, {"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": logprobs}]

    def _new_logprobs(self) -> list[dict[str, Any]]:
        """Of the message's text; this API has no place for those of reasoning."""
        return [self._output.logprobs.full(each) for each in self._output.new_logprobs() if not each.is_reasoning]

    def finish(self) -> list[dict[str, Any]]:
        """An answer without any text is still one message."""
        return [*([] if self._kind or self.done else self._open("message")), *self._close()]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.done), "content_index": 0}

    def _part(self) -> dict[str, Any]:
        if self._kind == "message":
            return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": [*self._logprobs]}
        return {"type": "reasoning_text", "text": self._text}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        if self._kind == "message":
            return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}
        return {"id": self._id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def _open(self, kind: str) -> list[dict[str, Any]]:
        self._kind, self._text, self._logprobs = kind, "", []
        self._id = f"{'msg' if kind == 'message' else 'rs'}_{secrets.token_hex(12)}"
        item = self._item("in_progress", [])
        return [
            {"type": "response.output_item.added", "output_index": len(self.done), "item": item},
            {"type": "response.content_part.added", **self._place(), "part": self._part()},
        ]

    def _close(self) -> list[dict[str, Any]]:
        if not self._kind:
            return []
        if self._kind == "message":
            self._logprobs += self._new_logprobs()
        part = self._part()
        name = "response.output_text.done" if self._kind == "message" else "response.reasoning_text.done"
        logprobs: dict[str, Any] = {"logprobs": part["logprobs"]} if self._kind == "message" else {}
        item = self._item("completed", [part])
        events = [
            {"type": name, **self._place(), "text": self._text, **logprobs},
            {"type": "response.content_part.done", **self._place(), "part": part},
            {"type": "response.output_item.done", "output_index": len(self.done), "item": item},
        ]
        self.done.append(item)
        self._kind = ""
        return events

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        index, item_id = len(self.done), f"fc_{secrets.token_hex(12)}"
        item = {"id": item_id, "type": "function_call", "call_id": call.id, "name": call.name}
        done = {**item, "arguments": call.arguments, "status": "completed"}
        place = {"item_id": item_id, "output_index": index}
        self.done.append(done)
        return [
            {
                "type": "response.output_item.added",
                "output_index": index,
                "item": {**item, "arguments": "", "status": "in_progress"},
            },
            {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments},
            {
                "type": "response.function_call_arguments.done",
                **place,
                "name": call.name,
                "arguments": call.arguments,
            },
            {"type": "response.output_item.done", "output_index": index, "item": done},
        ]


def _numbered(event: dict[str, Any], number: int) -> bytes:
    return event_bytes({**event, "sequence_number": number}, name=event["type"])
