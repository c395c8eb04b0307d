"""The OpenAPI 3.1 document of the HTTP server, served at /openapi.json: addresses, the fields that are read, answers
and errors.

The document covers the routes that the server has. Unnamed fields are ignored (docs/HTTP_API.md), so the objects allow
further properties. `fields.py` and `antefix.sampling` check the values of fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from antefix.sampling import PENALTY_MAX, STOP_TOKEN_IDS_MAX, TEMPERATURE_MAX
from antefix.version import __version__
from antefix_router.front import NUM_SAMPLES_MAX, TENANT_BYTES_MAX
from antefix_router.gateway.model_names import NAME_CHARACTERS_MAX
from antefix_router.gateway.openapi_answers import ANSWERS, ERRORS

Schema = dict[str, Any]
PATH: Final = "/openapi.json"

_TEXT: Final[Schema] = {"type": "string"}
_FLAG: Final[Schema] = {"type": "boolean"}
_OBJECT: Final[Schema] = {"type": "object"}
_USER: Final[Schema] = {"type": "string", "maxLength": TENANT_BYTES_MAX}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 2**32 - 1}
_STOP: Final[Schema] = {"anyOf": [_TEXT, {"type": "array", "items": {"type": "string", "minLength": 1}}]}
_TOKENS: Final[Schema] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXT_PART: Final[Schema] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
# Other kinds of parts: docs/HTTP_API.md.
_PART: Final[Schema] = {"type": "object", "required": ["type"], "properties": {"type": _TEXT}}
_CONTENT: Final[Schema] = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT_PART, _PART]}}]}
_ROLE: Final[Schema] = {"enum": ["system", "developer", "user", "assistant", "tool"]}
_MESSAGES: Final[Schema] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "required": ["role"], "properties": {"role": _ROLE, "content": _CONTENT}},
}
_TOOLS: Final[Schema] = {"type": "array", "items": _OBJECT}

# Fields that every API reads (gateway/knobs.py).
_SAMPLING: Final[Schema] = {
    "model": {"type": "string", "maxLength": NAME_CHARACTERS_MAX},
    "stream": _FLAG,
    "temperature": {"type": "number", "minimum": 0, "maximum": TEMPERATURE_MAX},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
    "presence_penalty": {"type": "number", "minimum": -PENALTY_MAX, "maximum": PENALTY_MAX},
    "frequency_penalty": {"type": "number", "minimum": -PENALTY_MAX, "maximum": PENALTY_MAX},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
    "min_tokens": {"type": "integer", "minimum": 0},
    "stop_token_ids": {**_TOKENS, "maxItems": STOP_TOKEN_IDS_MAX},
    "ignore_eos": _FLAG,
}
_OPENAI: Final[Schema] = {
    **_SAMPLING,
    "user": _USER,
    "prompt_cache_key": _USER,
    "max_tokens": _COUNT,
    "stop": _STOP,
    "n": {"type": "integer", "minimum": 1, "maximum": NUM_SAMPLES_MAX},
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
}


def _body(required: tuple[str, ...], properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


_REQUESTS: Final[dict[str, Schema]] = {
    "ChatRequest": _body(
        ("messages",),
        {
            **_OPENAI,
            "messages": _MESSAGES,
            "max_completion_tokens": _COUNT,
            "tools": _TOOLS,
            "tool_choice": {"anyOf": [_TEXT, _OBJECT]},
            "parallel_tool_calls": _FLAG,
            "response_format": _OBJECT,
            "logprobs": _FLAG,
            "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
            "thinking": _OBJECT,
            "reasoning_effort": _TEXT,
        },
    ),
    "CompletionRequest": _body(
        ("prompt",),
        {
            **_OPENAI,
            "prompt": {"anyOf": [_TEXT, _TOKENS]},
            "echo": _FLAG,
            "suffix": {"const": ""},
            "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        },
    ),
    "ResponseRequest": _body(
        ("input",),
        {
            **_SAMPLING,
            "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _OBJECT}]},
            "instructions": _TEXT,
            "max_output_tokens": _COUNT,
            "user": _USER,
            "prompt_cache_key": _USER,
            "tools": _TOOLS,
            "tool_choice": {"anyOf": [_TEXT, _OBJECT]},
            "include": {"type": "array", "items": _TEXT},
            "text": _OBJECT,
            "reasoning": _OBJECT,
        },
    ),
    "MessagesRequest": _body(
        ("max_tokens", "messages"),
        {
            **_SAMPLING,
            "max_tokens": _COUNT,
            "messages": _MESSAGES,
            "system": _CONTENT,
            "stop_sequences": {"type": "array", "items": {"type": "string", "minLength": 1}},
            "tools": _TOOLS,
            "tool_choice": _OBJECT,
            "thinking": _OBJECT,
            "metadata": {"type": "object", "properties": {"user_id": _USER}},
        },
    ),
    "CountTokensRequest": _body(("messages",), {"messages": _MESSAGES, "system": _CONTENT, "tools": _TOOLS}),
}
# For each address: its description, the schemas of request and answer, and whether the answer may be a stream of
# events.
_OPERATIONS: Final[dict[str, tuple[str, str, str, bool]]] = {
    "/v1/chat/completions": ("OpenAI chat", "ChatRequest", "ChatCompletion", True),
    "/v1/completions": ("OpenAI completions", "CompletionRequest", "Completion", True),
    "/v1/responses": ("OpenAI Responses, stateless", "ResponseRequest", "Response", True),
    "/v1/messages": ("Anthropic messages", "MessagesRequest", "Message", True),
    "/v1/messages/count_tokens": ("Tokens of a prompt", "CountTokensRequest", "TokenCount", False),
    "/v1/models": ("The model and its further names", "", "Models", False),
    "/v1/models/{name}": ("One model", "", "Model", False),
    "/v1/usage/receipts/{request_id}": ("A request's signed receipt", "", "Receipt", False),
    "/v1/usage": ("What a tenant used, by time and group", "", "UsagePage", False),
    "/v1/organization/usage/completions": ("The same, where OpenAI's clients look for it", "", "UsagePage", False),
    "/v1/usage/public_key": ("What receipts are checked with", "", "PublicKey", False),
    "/healthz": ("A request would be served", "", "Status", False),
    "/livez": ("The process answers", "", "Status", False),
    "/readyz": ("A request would be served", "", "Status", False),
    PATH: ("This document", "", "Document", False),
}
_READINESS: Final = ("/healthz", "/readyz")


def document(routes: Iterable[Route]) -> Schema:
    """The document for these routes. A route without a description here is left out: pages and metrics are not part of
    the API.
    """
    paths: dict[str, Schema] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        if path in _OPERATIONS:
            methods = sorted((route.methods or {"GET"}) - {"HEAD"})
            paths[path] = {method.lower(): _operation(path) for method in methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Antefix", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"key": []}],
        "components": {
            "schemas": {**_REQUESTS, **ANSWERS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def openapi_route(routes: list[Route]) -> Route:
    """The route of the document, which covers these routes and itself."""

    async def serve(request: Request) -> Response:
        return JSONResponse(document([*routes, route]))

    route = Route(PATH, serve, methods=["GET"])
    return route


def _operation(path: str) -> Schema:
    summary, request, answer, has_events = _OPERATIONS[path]
    content: Schema = {"application/json": {"schema": _ref(answer)}}
    if has_events:
        content["text/event-stream"] = {"schema": _TEXT}
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    responses = {"200": {"description": "The answer", "content": content}}
    responses |= {
        status: {"description": why, "content": {"application/json": {"schema": _ref(error)}}}
        for status, why in ERRORS.items()
    }
    if path in _READINESS:
        unready = {"application/json": {"schema": _ref("Unready")}}
        responses["503"] = {"description": "A request would not be served; `reason` says why", "content": unready}
    operation: Schema = {"summary": summary, "responses": responses}
    if request:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    if names := [part[1:-1] for part in path.split("/") if part.startswith("{")]:
        parameter = {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        operation["parameters"] = [{"name": name, **parameter} for name in names]
    return operation


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
