"""OpenAI's /v1/responses without server-side state: clients send the whole input, as agents with `store: false` do."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from antefix_billing.providers import responses_usage
from antefix_router.chat.messages import Conversation, Effort
from antefix_router.gateway.answer_form import RESPONSES_NAMES, flat_form
from antefix_router.gateway.content import end_conversation, retained
from antefix_router.gateway.fields import Fields, unsupported
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import event_bytes
from antefix_router.gateway.http_errors import Provider, error_body
from antefix_router.gateway.knobs import read_knobs
from antefix_router.gateway.modes import read_wish
from antefix_router.gateway.openai_messages import refuse_unsupported
from antefix_router.gateway.output import Ended, Output
from antefix_router.gateway.responses_input import input_messages
from antefix_router.gateway.responses_items import Items
from antefix_router.gateway.tools import openai_tools

_LOGPROBS = "message.output_text.logprobs"
_SEALED = "reasoning.encrypted_content"


async def prepare_response(gateway: Gateway, request: Request) -> ResponsesCall:
    """Read and admit a request.  Raises:  InvalidRequest and the other errors that `Gateway.chat` raises."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.model(fields)
    signatures = gateway.signatures(tenant)
    stream = fields.boolean("stream")
    user = fields.text("user", "")
    effort = gateway.choose_effort(read_wish(fields), model, Effort.HIGH, fields.notes)
    instructions = fields.text("instructions", "")
    messages = retained(end_conversation(input_messages(fields, instructions, signatures), fields), fields)
    raw_tools, raw_choice = fields.peek("tools", []), fields.peek("tool_choice", "auto")
    tools = openai_tools(fields)
    wanted = fields.texts("include")
    knobs = read_knobs(fields, "max_output_tokens", num_top_logprobs=_num_top_logprobs(fields, wanted))
    raw_text = fields.peek("text")
    text = fields.child("text")
    form = flat_form(None if text is None else text.child("format"))
    _refuse_state(fields)
    session = fields.text("prompt_cache_key", "")
    refuse_unsupported(fields)
    fields.close()
    fields.notes.close()
    conversation = Conversation(
        messages=messages,
        tools=tools.schemas,
        strict=tools.strict,
        tool_rule=tools.rule,
        tools_breakpoint=tools.breakpoint,
        effort=effort,
        answers_json=form.is_json,
        response_schema=form.schema,
    )
    conversation = gateway.settled(conversation, fields.notes)
    caller = gateway.caller(request, tenant, user, session=session)
    output = await gateway.chat(conversation, knobs, caller, fields.notes, RESPONSES_NAMES)
    echo = {
        "instructions": instructions or None,
        "max_output_tokens": knobs.max_tokens,
        "temperature": knobs.temperature,
        "top_p": knobs.top_p,
        "tools": raw_tools,
        "tool_choice": raw_choice,
        "parallel_tool_calls": tools.rule.parallel,
        "text": raw_text or {"format": {"type": "text"}},
    }
    items = Items(output, tools.grouped, signatures if _SEALED in wanted else None)
    timeout_s = gateway.config.http_timeout_s
    headers = fields.notes.headers()
    return ResponsesCall(output, items, model.asked_for, timeout_s, stream=stream, echo=echo, headers=headers)


def _num_top_logprobs(fields: Fields, wanted: list[str]) -> int | None:
    """How many alternatives the answer gives for each token: `include` asks for log probabilities, `top_logprobs` gives
    the number. Other values in `include` have no effect.
    """
    for index, name in enumerate(wanted):
        if name not in (_LOGPROBS, _SEALED):
            fields.notes.ignore(f"include[{index}]")
    num_top = fields.integer("top_logprobs")
    if num_top and _LOGPROBS not in wanted:
        raise unsupported("top_logprobs", f" needs {_LOGPROBS!r} in include")
    return (num_top or 0) if _LOGPROBS in wanted else None


def _refuse_state(fields: Fields) -> None:
    """Refuse references to earlier requests, because nothing is kept between requests.

    Raises:  WrongField: a field that would change the answer.
    """
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.only(name, lambda value: False, "requests are stateless here: send the whole input")
    fields.only("background", lambda value: value is False, "there is no background mode")
    fields.only("context_management", lambda value: not value, "content is never taken out of the input")
    fields.child("stream_options")


class ResponsesCall:
    """One answer in the forms of the Responses API."""

    def __init__(
        self,
        output: Output,
        items: Items,
        model: str,
        timeout_s: float,
        *,
        stream: bool,
        echo: dict[str, Any],
        headers: dict[str, str],
    ) -> None:
        self.stream = stream
        self.headers = {"x-request-id": output.request_id, **headers}
        self._output = output
        self._items = items
        self._model = model
        self._timeout_s = timeout_s
        self._echo = echo
        self._created = int(time.time())
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        items = self._items
        async for delta in self._output.deltas(self._timeout_s, held=True):
            items.push(delta)
        items.finish(is_shown=False)
        ended = self._output.ended()
        self.headers |= ended.headers
        return self._response(items.done, ended)

    async def events(self) -> AsyncGenerator[bytes, None]:
        items, started = self._items, False
        async for delta in self._output.deltas(self._timeout_s):
            opening = [] if started else self._opening()
            started = True
            for event in [*opening, *items.push(delta)]:
                yield self._numbered(event)
        ended = self._output.ended()
        last = self._response(items.done, ended)
        closing = ([] if started else self._opening()) + items.finish()
        last["output"] = items.done
        kind = "response.incomplete" if ended.reason == "length" else "response.completed"
        for event in [*closing, {"type": kind, "response": last}]:
            yield self._numbered(event)

    def failed(self, err: Exception) -> bytes:
        """A failure in the form of OpenAI's own streams: an `error` event, which its clients raise, and then the
        response as failed.
        """
        _, body = error_body(err, Provider.OPENAI)
        error = body["error"]
        told = {"code": error["code"], "message": error["message"]}
        response = {**self._response([], None), "status": "failed", "error": told}
        events = ({"type": "error", **told, "param": error["param"], "error": error},)
        return b"".join(self._numbered(each) for each in (*events, {"type": "response.failed", "response": response}))

    def _numbered(self, event: dict[str, Any]) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return event_bytes({**event, "sequence_number": number}, name=event["type"])

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
            "usage": ended.usage(responses_usage) if ended is not None else None,
            **self._echo,
        }
