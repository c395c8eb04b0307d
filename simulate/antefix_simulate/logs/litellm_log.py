"""LiteLLM's logs: rows of StandardLoggingPayload, alone or inside a callback's arguments, and rows of its spend
logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from antefix_simulate.logs.chat_log import answer_of, body_of, calls_of
from antefix_simulate.logs.log_rows import json_rows, unpacked
from antefix_simulate.logs.logged_call import Ignored, LoggedCall

# Kinds of calls that have a prompt; others (embeddings, images, speech) have no prefix to cache.
_WITH_PROMPT: Final = ("completion", "responses", "anthropic_messages", "generate_content", "pass_through")


def read_litellm(path: Path, ignored: Ignored) -> Iterator[LoggedCall]:
    """Raises:  InvalidRequest: the file cannot be read to its end."""
    said: dict[str, bytes] = {}
    for outer in json_rows(path, ignored):
        row = _payload(outer)
        call_type = str(row.get("call_type") or "completion")
        if not any(kind in call_type for kind in _WITH_PROMPT):
            ignored.count(f"calls of type {call_type[:40]}")
        elif row.get("status") == "failure":
            ignored.count("calls that failed")
        elif (body := _body(row)) is None:
            ignored.count("rows without a prompt")
        else:
            answer = answer_of(row)
            if not isinstance(answer.get("usage"), dict):
                answer = answer | {"usage": {name: row.get(name) for name in ("prompt_tokens", "completion_tokens")}}
            who = unpacked(row.get("metadata"))
            user = _user(row, who if isinstance(who, dict) else {})
            yield from calls_of(row | {"user": user}, body | {"user": user}, answer, ignored, said)


def _payload(row: dict[str, Any]) -> dict[str, Any]:
    inside = [row, *(each for name in ("kwargs", "payload") if isinstance(each := row.get(name), dict))]
    found = (unpacked(each.get("standard_logging_object")) for each in inside)
    return next((each for each in found if isinstance(each, dict)), row)


def _body(row: dict[str, Any]) -> dict[str, Any] | None:
    """The prompt of a row, together with the tools, which LiteLLM logs separately."""
    messages = unpacked(row.get("messages"))
    if isinstance(messages, dict):
        return body_of(messages)
    parameters = unpacked(row.get("model_parameters"))
    tools = parameters.get("tools") if isinstance(parameters, dict) else None
    if messages:
        return {"messages": messages, "tools": tools}
    request = unpacked(row.get("proxy_server_request"))
    return body_of(request) if isinstance(request, dict) else None


def _user(row: dict[str, Any], metadata: dict[str, Any]) -> str:
    names = ("user_api_key_hash", "user_api_key_user_id", "user_api_key_team_id")
    found = [metadata.get(name) for name in names] + [row.get("api_key"), row.get("end_user"), row.get("user")]
    return next((each for each in found if isinstance(each, str) and each), "")
