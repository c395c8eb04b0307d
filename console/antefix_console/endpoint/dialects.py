"""Requests and answers of each API: paths, bodies, events of a stream. Pure; one class per API.

Sources: the OpenAI API reference (chat completions, completions), Anthropic's (messages), DeepSeek's (cache fields of
`usage`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from antefix.errors import InvalidRequest
from antefix_console.endpoint.reply import Question, ReportedUsage

_ANTHROPIC_VERSION = "2023-06-01"


@dataclass(slots=True)
class Stream:
    """The part of one answer that was received so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    answer_id: str = ""
    error: str = ""


class Dialect(Protocol):
    """One API."""

    path: str

    def headers(self, key: str) -> dict[str, str]: ...

    def body(self, model: str, question: Question) -> dict[str, Any]: ...

    def read(self, event: Mapping[str, Any], into: Stream) -> bool:
        """Add one event of a stream to the answer. Returns True if the event contained text."""
        ...

    def usage(self, stream: Stream) -> ReportedUsage: ...


class Chat:
    """OpenAI's chat completions."""

    path = "/chat/completions"

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def body(self, model: str, question: Question) -> dict[str, Any]:
        body = _openai_body(model, question)
        body["messages"] = [{"role": "user", "content": question.prompt}]
        if question.logprobs:
            body["logprobs"] = True
        return body

    def read(self, event: Mapping[str, Any], into: Stream) -> bool:
        _note_usage(event, into)
        had_text = False
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            # Reasoning counts as output, and its first token is the first token.
            for name in ("reasoning_content", "reasoning", "content"):
                if delta.get(name):
                    into.text.append(delta[name])
                    had_text = True
            logprobs = (choice.get("logprobs") or {}).get("content") or ()
            into.logprobs += [float(each["logprob"]) for each in logprobs]
        return had_text

    def usage(self, stream: Stream) -> ReportedUsage:
        return _openai_usage(stream.usage)


class Completions:
    """OpenAI's completions: the prompt is used as it is, without a chat format."""

    path = "/completions"

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def body(self, model: str, question: Question) -> dict[str, Any]:
        body = _openai_body(model, question)
        body["prompt"] = question.prompt
        if question.logprobs:
            body["logprobs"] = 1
        return body

    def read(self, event: Mapping[str, Any], into: Stream) -> bool:
        _note_usage(event, into)
        had_text = False
        for choice in event.get("choices") or ():
            if choice.get("text"):
                into.text.append(choice["text"])
                had_text = True
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
            into.logprobs += [float(each) for each in logprobs if each is not None]
        return had_text

    def usage(self, stream: Stream) -> ReportedUsage:
        return _openai_usage(stream.usage)


class Messages:
    """Anthropic's messages. Anthropic's `input_tokens` excludes tokens read from the cache or written to it."""

    path = "/messages"

    def headers(self, key: str) -> dict[str, str]:
        return {"anthropic-version": _ANTHROPIC_VERSION} | ({"x-api-key": key} if key else {})

    def body(self, model: str, question: Question) -> dict[str, Any]:
        block: dict[str, Any] = {"type": "text", "text": question.prompt}
        if question.breakpoint:
            block["cache_control"] = {"type": "ephemeral"}
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": True,
            "messages": [{"role": "user", "content": [block]}],
        }
        if question.user:
            body["metadata"] = {"user_id": question.user}
        if question.salt:
            body["cache_salt"] = question.salt
        return body

    def read(self, event: Mapping[str, Any], into: Stream) -> bool:
        message = event.get("message") or {}
        into.answer_id = into.answer_id or str(message.get("id") or "")
        usage = message.get("usage") or event.get("usage") or {}
        into.usage.update({name: value for name, value in usage.items() if value is not None})
        _note_error(event, into)
        delta = event.get("delta") or {}
        text = delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
        into.text += [text] if text else []
        return bool(text)

    def usage(self, stream: Stream) -> ReportedUsage:
        found = stream.usage
        cached, written = _count(found, "cache_read_input_tokens"), _count(found, "cache_creation_input_tokens")
        return ReportedUsage(
            prompt_tokens=_count(found, "input_tokens") + cached + written,
            cached_tokens=cached,
            written_tokens=written,
            output_tokens=_count(found, "output_tokens"),
            reports_hits="cache_read_input_tokens" in found,
        )


DIALECTS: dict[str, Dialect] = {"chat": Chat(), "completions": Completions(), "messages": Messages()}


def _openai_body(model: str, question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if question.user:
        body["user"] = question.user
    if question.salt:
        body["cache_salt"] = question.salt
    return body


def _note_usage(event: Mapping[str, Any], into: Stream) -> None:
    into.answer_id = into.answer_id or str(event.get("id") or "")
    if event.get("usage"):
        into.usage = dict(event["usage"])
    _note_error(event, into)


def _note_error(event: Mapping[str, Any], into: Stream) -> None:
    if event.get("error"):
        error = event["error"]
        into.error = str(error.get("message") or error.get("type")) if isinstance(error, dict) else str(error)


def _openai_usage(found: Mapping[str, Any]) -> ReportedUsage:
    details = found.get("prompt_tokens_details") or {}
    # Hit tokens: OpenAI's field, else DeepSeek's.
    says = [each for each in (details.get("cached_tokens"), found.get("prompt_cache_hit_tokens")) if each is not None]
    missed = found.get("prompt_cache_miss_tokens")
    return ReportedUsage(
        prompt_tokens=_count(found, "prompt_tokens"),
        cached_tokens=_whole(says[0], "cached_tokens") if says else 0,
        written_tokens=_whole(details.get("cache_write_tokens") or 0, "cache_write_tokens"),
        output_tokens=_count(found, "completion_tokens"),
        missed_tokens=None if missed is None else _whole(missed, "prompt_cache_miss_tokens"),
        reports_hits=bool(says),
    )


def _count(found: Mapping[str, Any], name: str) -> int:
    return _whole(found.get(name) or 0, name)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise InvalidRequest(f"the endpoint reports {name} {value!r} as usage, which is not a number of tokens")
    return value
