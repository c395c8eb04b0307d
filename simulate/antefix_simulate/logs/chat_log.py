"""Logs of OpenAI's and Anthropic's requests: bare bodies, batch files, and pairs of request and response.

{"messages": [...]}                                          a body alone, as in files for fine-tuning
{"custom_id": ..., "body": {...}} or "params"                a batch's input
{"timestamp": ..., "request": {...}, "response": {...}}      what a gateway or client logs; names may differ
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from antefix_simulate.logs.chat_text import is_redacted, message_bytes, prompt_bytes
from antefix_simulate.logs.log_fields import count, session_in, time_in, usage_in, user_in
from antefix_simulate.logs.log_rows import json_rows, unpacked
from antefix_simulate.logs.logged_call import Ignored, LoggedCall, Tokens

_PROMPTS: Final = ("messages", "prompt", "input", "prompt_token_ids")
_BODIES: Final = ("body", "request", "params", "request_body", "input", "json", "payload", "kwargs", "data")
_ANSWERS: Final = ("response", "output", "response_body", "completion", "result", "message")
_TOKEN_MAX: Final = 1 << 32


def read_chats(path: Path, ignored: Ignored) -> Iterator[LoggedCall]:
    """Raises:  InvalidRequest: the file cannot be read to its end."""
    said: dict[str, bytes] = {}
    for row in json_rows(path, ignored):
        body, answer = body_of(row), answer_of(row)
        if body is None:
            ignored.count("rows without a prompt")
            continue
        yield from calls_of(row, body, answer, ignored, said)


def calls_of(
    row: dict[str, Any], body: dict[str, Any], answer: dict[str, Any], ignored: Ignored, said: dict[str, bytes]
) -> Iterator[LoggedCall]:
    """The calls in one row of a log: several if a Completions body has several prompts.

    said: for the id of each Responses answer, all text up to its end. A later body names this id instead of repeating
    the text.
    """
    metadata = next((each for each in (body.get("metadata"), row.get("metadata")) if isinstance(each, dict)), {})
    usage = usage_in(answer, row, body)
    shared: dict[str, Any] = {
        "at_s": time_in(row, answer, body),
        "output_tokens": usage.output,
        "output_bytes": _answer_bytes(answer),
        "cached_tokens": usage.cached,
        "session": session_in(row, metadata, body),
        "user": user_in(body, metadata, row),
    }
    prompts = _prompts(body)
    if prompts is not None:
        for prompt in prompts:
            tokens = _tokens(prompt)
            text = b"" if tokens is not None else str(prompt).encode(errors="replace")
            alone = usage.prompt if len(prompts) == 1 else None
            yield LoggedCall(**shared, text=text, tokens=tokens, num_tokens=alone)
        return
    text = prompt_bytes(body, ignored)
    if body.get("previous_response_id"):
        before = said.get(str(body["previous_response_id"]))
        if before is None:
            ignored.count("requests whose earlier turns are in no row before them")
        text = (before or b"") + text
    if isinstance(answer.get("id"), str) and "input" in body:
        # A later request continues from this answer, so it is part of that prompt.
        output = answer.get("output")
        items = output if isinstance(output, list) else []
        said[answer["id"]] = text + b"".join(message_bytes(item, ignored) for item in items)
    if not text or is_redacted(text):
        ignored.count("requests whose text is not in the log")
        return
    yield LoggedCall(**shared, text=text, num_tokens=usage.prompt)


def body_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """The request body in a row, at whatever depth; None if the row has none."""
    for _ in range(3):
        if _has_prompt(row):
            return row
        inside = [unpacked(row.get(name)) for name in _BODIES]
        found = next((each for each in inside if isinstance(each, dict)), None)
        if found is None:
            return None
        row = found
    return None


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """The response in a row; empty if the row has none."""
    for name in _ANSWERS:
        found = unpacked(row.get(name))
        if isinstance(found, dict):
            inside = unpacked(found.get("body"))
            # A batch's result wraps it once more.
            message = found.get("message") if found.get("type") == "succeeded" else None
            return next((each for each in (inside, message) if isinstance(each, dict)), found)
    return {}


def _has_prompt(row: dict[str, Any]) -> bool:
    if any(isinstance(unpacked(row.get(name)), list) for name in ("messages", "prompt_token_ids")):
        return True
    if isinstance(row.get("prompt"), str | list):
        return True
    # Some logs also call the whole request "input".
    return "model" in row and isinstance(row.get("input"), str | list)


def _prompts(body: dict[str, Any]) -> list[Any] | None:
    """The prompts of a Completions body; None if the body is a chat."""
    if _tokens(body.get("prompt_token_ids")) is not None:
        return [body["prompt_token_ids"]]
    prompt = body.get("prompt")
    if body.get("messages") or not isinstance(prompt, str | list) or not prompt:
        return None
    if isinstance(prompt, list) and all(isinstance(each, str | list) for each in prompt):
        return prompt
    return [prompt] if isinstance(prompt, str) or _tokens(prompt) is not None else None


def _tokens(value: Any) -> Tokens | None:
    if not isinstance(value, list) or not value:
        return None
    if not all(type(each) is int and 0 <= each < _TOKEN_MAX for each in value):
        return None
    return np.asarray(value, dtype=np.uint32)


def _answer_bytes(answer: dict[str, Any]) -> int:
    """Length of the answer's text, for logs without token counts."""
    if count(answer.get("output_bytes")) is not None:
        return count(answer["output_bytes"]) or 0
    nothing = Ignored()
    choices = answer.get("choices")
    if isinstance(choices, list):
        messages = [each.get("message") or each.get("text") for each in choices if isinstance(each, dict)]
        return sum(len(message_bytes(message, nothing)) for message in messages if message)
    return len(message_bytes({"content": answer.get("content") or answer.get("output")}, nothing)) if answer else 0
