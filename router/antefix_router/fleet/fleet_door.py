"""The HTTP API of a fleet's router, which passes OpenAI's chat and text completions unchanged to the best placed
worker.

The router reads only the parts of a body that it needs: model, prompt, limits, and whether the answer is a stream. The
worker reads or refuses everything else, such as tools, and its answer goes back unchanged.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import xxhash
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from antefix.errors import InvalidRequest
from antefix.generation_request import GenerationRequest
from antefix.sampling import Sampling
from antefix_router.encoding import Encoding
from antefix_router.fleet.engines import Engines
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_names import scope_of
from antefix_router.fleet.openai_door import ServedModel
from antefix_router.fleet.passed_call import CHAT, COMPLETIONS, PassedCall, PassedGeneration
from antefix_router.fleet.prompt_tokens import PromptTokens
from antefix_router.front import NUM_SAMPLES_MAX, BilledFront, ContextTooLong, cache_tenant
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.app import application, common_routes
from antefix_router.gateway.cache_report import cache_details, cache_headers
from antefix_router.gateway.fields import wrong_value
from antefix_router.gateway.gateway import Door, HttpCaller
from antefix_router.gateway.http import Endpoint, error_event, event_bytes
from antefix_router.gateway.http_errors import ModelNotFound, Provider, error_response
from antefix_router.gateway.model_names import REFUSE
from antefix_router.open_bill import Bill

# If nothing else is known about two requests, they go to the same worker when their texts begin with this many equal
# bytes.
_BEGINNING_BYTES: Final = 4096
# No engine accepts a longer prompt.
_TOKEN_IDS_MAX: Final = 1 << 22
PATHS: Final = (CHAT, COMPLETIONS)


class FleetDoor(Door):
    """The HTTP API of one router in front of a fleet. Callers are admitted and identified in the same way as at a
    router of our own workers.
    """

    def __init__(self, front: BilledFront, config: FleetConfig, engines: Engines, tokens: PromptTokens) -> None:
        super().__init__(front, config, Encoding(), num_tokens_max=_TOKEN_IDS_MAX)
        self._fleet = config
        self._engines = engines
        self._tokens = tokens

    async def prepare(self, path: str, request: Request) -> PassedAnswer:
        """Admit a request.  Raises:  InvalidRequest, ModelNotFound, QuotaExceeded, PassedError."""
        tenant = self.tenant(request)
        config = self._fleet
        body = await self.body(request, tenant)
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        caller = self.caller(request, tenant, _text(body, "user"), session=_text(body, "prompt_cache_key"))
        call = await self.call(path, body, caller)
        bill = await self.admit(call, caller)
        return PassedAnswer(self.books, bill, config.http_timeout_s, wants_details=caller.wants_details)

    async def call(self, path: str, body: dict[str, Any], caller: HttpCaller) -> PassedCall:
        """The body as it is passed to a worker, and what is known about the prompt in it.  Raises: as `prepare`."""
        model = self._model(_text(body, "model"))
        sent, options = {**body, "model": model.name}, _options(body)
        stream = body.get("stream") is True
        if stream:
            sent["stream_options"] = {**options, "include_usage": True, "continuous_usage_stats": True}
        if not self._limit(body):
            sent["max_completion_tokens" if path == CHAT else "max_tokens"] = self._fleet.http_max_tokens
        salt = self._salt(caller, body.get("cache_salt"))
        if salt:
            sent["cache_salt"] = salt
        tokens = await self._tokens.of(path, sent, model.name)
        prompt = json.dumps(body.get("messages" if path == CHAT else "prompt"), ensure_ascii=False).encode()
        call = PassedCall(
            path=path,
            body=sent,
            model=model.name,
            scope=scope_of(lora=model.name if model.is_adapter else "", salt=salt),
            tokens=tokens,
            # No tokenizer makes more tokens than the text has bytes.
            num_prompt_tokens_about=len(prompt),
            stream=stream,
            wants_usage=options.get("include_usage") is True,
            wants_running_usage=options.get("continuous_usage_stats") is True,
            affinity=xxhash.xxh3_64_intdigest(prompt[:_BEGINNING_BYTES]),
        )
        most = model.num_tokens_max
        if most and tokens is not None and len(tokens) >= most:
            raise ContextTooLong(f"the prompt is too long: {len(tokens)} tokens; {model.name} takes {most}")
        return call

    async def admit(self, call: PassedCall, caller: HttpCaller) -> Bill:
        cache_tenant(caller.tenant, caller.user)
        num = call.body.get("n")
        num_samples = num if type(num) is int and 1 <= num <= NUM_SAMPLES_MAX else 1
        if num is not None and num != num_samples:
            raise wrong_value("n", f" must be from 1 to {NUM_SAMPLES_MAX}")
        if not caller.request_id:
            caller = replace(caller, request_id=secrets.token_hex(12))
        request = GenerationRequest(
            tokens=np.empty(0, np.uint32) if call.tokens is None else np.asarray(call.tokens, np.uint32),
            sampling=Sampling(max_tokens=self._limit(call.body) or self._fleet.http_max_tokens),
            caller=caller,
            num_samples=num_samples,
            model=call.model,
            content=_canonical(call.body),
            num_tokens_about=call.num_prompt_tokens,
        )
        bill = await self.books.accounts.admit(
            request, generation=partial(PassedGeneration, call=call), is_named=caller.is_named
        )
        if call.tokens is not None:
            bill.prefix_volatile = self.books.prefixes.note(request.cache_tenant, request.tokens)
        return bill

    def models_json(self) -> list[dict[str, Any]]:
        return [_model_json(model, self.started) for model in self._engines.models]

    def _model(self, name: str) -> ServedModel:
        """The model of this name. Raises: ModelNotFound: no worker serves the requested model, and there is no single
        other model that could replace it.
        """
        models = self._engines.models
        found = next((model for model in models if model.name == name), None)
        if found is None and len(models) == 1 and self._fleet.unknown_models != REFUSE:
            return models[0]
        if found is None:
            served = ", ".join(model.name for model in models) or "none: no worker has answered yet"
            raise ModelNotFound(f"the model {name[:200]!r} is not served here; there is {served}")
        return found

    def _limit(self, body: Mapping[str, Any]) -> int:
        """The largest number of output tokens that the client allows; 0 if the client sets none."""
        for name in ("max_completion_tokens", "max_tokens"):
            value = body.get(name)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise wrong_value(name, " must be a positive integer")
                return int(value)
        return 0

    def _salt(self, caller: HttpCaller, asked: Any) -> str:
        """The engine's cache salt, which separates the prefixes of tenants. The salt includes the salt that the client
        sent.
        """
        if asked is not None and not (isinstance(asked, str) and asked):
            raise wrong_value("cache_salt", " must be a text that is not empty")
        if not caller.tenant or self._fleet.share_caches:
            return asked or ""
        state = hashlib.blake2b(key=self.books.accounts.keyring.key(caller.tenant), digest_size=16)
        state.update((asked or "").encode())
        return state.hexdigest()


class PassedAnswer:
    """The answer of one admitted request, passed back to its client."""

    def __init__(self, front: BilledFront, bill: Bill, timeout_s: float, *, wants_details: bool) -> None:
        assert isinstance(bill.generation, PassedGeneration)
        self.stream = bill.generation.call.stream
        self.headers = {"x-request-id": bill.generation.request.request_id}
        self._front = front
        self._bill = bill
        self._generation = bill.generation
        self._timeout_s = timeout_s
        self._wants_details = wants_details

    async def whole(self) -> dict[str, Any]:
        self._bill.is_held = True
        async for _ in self._front.run(self._bill, self._timeout_s):
            pass
        answer = self._generation.answer
        assert answer is not None
        self.headers |= cache_headers(self._bill.record)
        self._add_details(answer)
        return answer

    def _add_details(self, answer: dict[str, Any]) -> None:
        if self._wants_details and isinstance(answer.get("usage"), dict):
            answer["usage"]["antefix"] = cache_details(self._bill.record)

    async def events(self) -> AsyncGenerator[bytes, None]:
        async for _ in self._front.run(self._bill, self._timeout_s):
            for event in self._generation.taken():
                yield event_bytes(event)
        if (last := self._generation.last) is not None:
            self._add_details(last)
            yield event_bytes(last)
        yield event_bytes("[DONE]")

    def failed(self, err: Exception) -> bytes:
        return error_event(err, Provider.OPENAI)


def build_fleet_app(
    door: FleetDoor, config: FleetConfig, measures: HttpMeasures, more: Iterable[Route] = ()
) -> Starlette:
    """The ASGI application of the HTTP API. more: further addresses that are not part of an API."""
    routes = [
        Route(
            path,
            Endpoint(
                partial(door.prepare, path),
                Provider.OPENAI,
                door.entering,
                keep_alive_s=config.http_keep_alive_s,
                limits=door.limit_headers,
            ),
            methods=["POST"],
        )
        for path in PATHS
    ]
    routes += [
        Route("/v1/models", partial(_list_models, door), methods=["GET"]),
        Route("/v1/models/{name:path}", partial(_list_models, door), methods=["GET"]),
        *common_routes(door),
        *more,
    ]
    return application(routes, measures, config)


async def _list_models(door: FleetDoor, request: Request) -> JSONResponse:
    try:
        door.tenant(request)
        models = door.models_json()
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": models})
        found = next((model for model in models if model["id"] == name), None)
        if found is None:
            raise ModelNotFound(f"the model {name[:200]!r} is not served here")
        return JSONResponse(found)
    except Exception as err:  # noqa: BLE001 - answered in the caller's shape
        return error_response(err, Provider.OPENAI)


def _model_json(model: ServedModel, created: int) -> dict[str, Any]:
    more = {"max_model_len": model.num_tokens_max} if model.num_tokens_max else {}
    return {"id": model.name, "object": "model", "created": created, "owned_by": "antefix", **more}


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong_value(name, " must be text")
    return value or ""


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise wrong_value("stream_options", " must be an object")
    return options or {}


def _canonical(body: Mapping[str, Any]) -> bytes:
    """The part of a request's body that is the same in equal requests. This part of the body leaves out how the answer
    is delivered.
    """
    said = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
