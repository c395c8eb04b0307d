"""The answers in the OpenAPI document: the fields that are always present, and the errors of every address."""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]
_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_OBJECT: Final[Schema] = {"type": "object"}
_LIST: Final[Schema] = {"type": "array", "items": _OBJECT}


def _always(**properties: Any) -> Schema:
    """An object that has all of these properties, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties}


_USAGE: Final = _always(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_READ_USAGE: Final = _always(input_tokens=_COUNT, output_tokens=_COUNT)

ANSWERS: Final[dict[str, Schema]] = {
    "ChatCompletion": _always(
        id=_TEXT, object={"const": "chat.completion"}, created=_COUNT, model=_TEXT, choices=_LIST, usage=_USAGE
    ),
    "Completion": _always(
        id=_TEXT, object={"const": "text_completion"}, created=_COUNT, model=_TEXT, choices=_LIST, usage=_USAGE
    ),
    "Response": _always(id=_TEXT, object={"const": "response"}, model=_TEXT, output=_LIST, usage=_READ_USAGE),
    "Message": _always(
        id=_TEXT, type={"const": "message"}, role={"const": "assistant"}, model=_TEXT, content=_LIST, usage=_READ_USAGE
    ),
    "TokenCount": _always(input_tokens=_COUNT),
    "Models": _always(data=_LIST),
    "Model": _always(id=_TEXT),
    "Receipt": _always(payload=_TEXT, sequence=_COUNT, hash=_TEXT, signature=_TEXT),
    # A page of buckets or, with shape=plain, rows. `next_page` is null on the last page.
    "UsagePage": {
        "type": "object",
        "properties": {
            "object": {"const": "page"},
            "data": {"type": "array", "items": {"type": "object"}},
            "rows": {"type": "array", "items": {"type": "object"}},
            "next_page": {"type": ["string", "null"]},
        },
        "required": ["next_page"],
    },
    "PublicKey": _always(algorithm={"const": "Ed25519"}, public_key=_TEXT),
    "Status": _always(status={"const": "ok"}),
    "Unready": _always(status={"const": "unavailable"}, reason=_TEXT),
    "Document": _always(openapi=_TEXT, paths=_OBJECT),
    "Error": _always(error=_always(message=_TEXT, type=_TEXT, code=_TEXT)),
    "AnthropicError": _always(type={"const": "error"}, error=_always(type=_TEXT, message=_TEXT)),
}

ERRORS: Final = {
    "400": "The request is wrong; `param` names the field",
    "401": "No valid API key",
    "403": "The key may not do this",
    "404": "No such model, request or address",
    "405": "The address takes other methods",
    "408": "The body did not arrive in time",
    "409": "The Idempotency-Key is in use, or was used for another request",
    "413": "The body is too large",
    "429": "A limit is reached; `retry-after` says when to try again",
    "500": "A bug in Antefix; the id in the message is in the log",
    "503": "No worker can answer the request now",
    "504": "The request took longer than the time limit",
}
