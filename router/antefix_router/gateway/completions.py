"""OpenAI's /v1/completions, whose prompt is used unchanged (text or token ids), and /v1/models."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from antefix.errors import InvalidRequest
from antefix.telemetry import span
from antefix_router.gateway.answer_form import chat_form
from antefix_router.gateway.chat import stream_options
from antefix_router.gateway.choices_call import ChoicesCall
from antefix_router.gateway.content import retention_ttl
from antefix_router.gateway.fields import Fields
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.http import event_bytes
from antefix_router.gateway.http_errors import Provider, error_response
from antefix_router.gateway.knobs import read_knobs
from antefix_router.gateway.notes import Notes
from antefix_router.gateway.openai_messages import refuse_unsupported
from antefix_router.gateway.output import Output


async def prepare_completion(gateway: Gateway, request: Request) -> CompletionCall:
    """Read and admit a request.  Raises:  InvalidRequest and the other errors that `Gateway.complete` raises."""
    tenant = gateway.tenant(request)
    fields = await gateway.fields(request)
    model = gateway.model(fields)
    stream, include_usage = stream_options(fields)
    user = fields.text("user", "")
    echo = fields.boolean("echo")
    text, tokens = await _prompt(gateway, fields.take("prompt"), tenant, echo=echo)
    knobs = read_knobs(fields, "max_tokens", num_top_logprobs=fields.integer("logprobs"), several=True)
    form = chat_form(fields)
    if echo and knobs.num_top_logprobs is not None:
        raise InvalidRequest(
            "logprobs cannot be combined with echo, because log probabilities of the prompt are not computed"
        )
    fields.only("suffix", lambda value: value == "", "this model does not fill in the middle")
    session = fields.text("prompt_cache_key", "")
    retention_s = retention_ttl(fields)
    refuse_unsupported(fields)
    fields.close()
    fields.notes.close()
    caller = gateway.caller(request, tenant, user, session=session)
    choices = await gateway.complete(tokens, knobs, caller, form, retention_s=retention_s)
    timeout_s = gateway.config.http_timeout_s
    call = CompletionCall(
        choices,
        model.asked_for,
        timeout_s,
        stream=stream,
        include_usage=include_usage,
        headers=fields.notes.headers(),
    )
    call.echo = text if echo else ""
    return call


async def _prompt(gateway: Gateway, prompt: Any, tenant: str, *, echo: bool) -> tuple[str, list[int]]:
    """The prompt of a request, as text and as tokens. In this API the caller writes directly for the model, so special
    tokens in the text count as such.
    """
    tokenizer = gateway.front.tokenizer
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        gateway.front.check_text(len(prompt))
        with span("tokenize", num_characters=len(prompt)):
            encode = partial(tokenizer.encode, prompt)
            return prompt, await gateway.front.encoding.run(len(prompt), encode, tenant=tenant)
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        vocab_size = gateway.front.identity.vocab_size
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise InvalidRequest(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
        return (tokenizer.decode(prompt) if echo else ""), prompt
    raise InvalidRequest("prompt must be one string or one list of token ids")


class CompletionCall(ChoicesCall):
    """One answer, or several, in the form of text completions.  echo: the prompt, if the answer repeats it."""

    kind = "text_completion"
    id_prefix = "cmpl"
    echo = ""

    async def events(self) -> AsyncGenerator[bytes, None]:
        if self.echo:
            for index, output in enumerate(self._choices.shown):
                yield self._event(self.kind, [_choice(index, output, self.echo, None)])
        async for index, delta in self._choices.deltas(self._timeout_s):
            yield self._event(self.kind, [_choice(index, self._choices.shown[index], delta.content, None)])
        shown = self._choices.shown
        for index, output in enumerate(shown):
            yield self._event(self.kind, [_choice(index, output, "", output.ended().reason)])
        if self._include_usage:
            yield self._event(self.kind, [], usage=self._usage())
        yield event_bytes("[DONE]")

    def _whole_choice(self, index: int, output: Output) -> dict[str, Any]:
        return _choice(index, output, self.echo + output.content, output.ended().reason)


def _choice(index: int, output: Output, text: str, finish_reason: str | None) -> dict[str, Any]:
    spoken = output.new_logprobs()
    logprobs = output.logprobs.completion(spoken) if spoken else None
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


async def list_models(gateway: Gateway, request: Request) -> JSONResponse:
    """GET /v1/models and /v1/models/{name}, in OpenAI's form plus the fields that Anthropic's clients read."""
    provider = Provider.ANTHROPIC if "anthropic-version" in request.headers else Provider.OPENAI
    try:
        gateway.tenant(request)
        name = request.path_params.get("name")
        if name is not None:
            notes = Notes()
            found = gateway.model(Fields({"model": name}, notes=notes))
            return JSONResponse(_model(gateway, found.asked_for), headers=notes.headers())
        models = [_model(gateway, each) for each in gateway.models.listed]
    except Exception as err:  # noqa: BLE001 - answered in the caller's shape
        return error_response(err, provider)
    page = {"has_more": False, "first_id": models[0]["id"], "last_id": models[-1]["id"]}
    return JSONResponse({"object": "list", "data": models, **page})


def _model(gateway: Gateway, name: str) -> dict[str, Any]:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(gateway.started))
    return {
        "id": name,
        "object": "model",
        "created": gateway.started,
        "owned_by": "antefix",
        "type": "model",
        "display_name": name,
        "created_at": created,
        "max_model_len": gateway.front.identity.max_tokens,
    }
