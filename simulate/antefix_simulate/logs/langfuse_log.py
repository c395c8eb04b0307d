"""Langfuse's exports: observations of type GENERATION, as JSON lines, JSON or CSV, from its API, page or blobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from antefix_simulate.logs.chat_log import calls_of
from antefix_simulate.logs.log_fields import LoggedUsage, count, usage_in
from antefix_simulate.logs.log_rows import json_rows, unpacked
from antefix_simulate.logs.logged_call import Ignored, LoggedCall


def read_langfuse(path: Path, ignored: Ignored) -> Iterator[LoggedCall]:
    """Raises:  InvalidRequest: the file cannot be read to its end."""
    said: dict[str, bytes] = {}
    for row in json_rows(path, ignored):
        kind = str(row.get("type") or "GENERATION").upper()
        if kind != "GENERATION":
            ignored.count(f"observations of type {kind[:40]}")
            continue
        body = _body(unpacked(row.get("input")), unpacked(row.get("modelParameters") or row.get("model_parameters")))
        if body is None:
            ignored.count("generations without an input")
            continue
        output, usage = unpacked(row.get("output")), _usage(row)
        answer: dict[str, Any] = {"content": output, "usage": _as_openai(usage)}
        yield from calls_of(row, body, answer, ignored, said)


def _body(given: Any, parameters: Any) -> dict[str, Any] | None:
    tools = parameters.get("tools") if isinstance(parameters, dict) else None
    if isinstance(given, str) and given:
        return {"messages": [{"role": "user", "content": given}], "tools": tools}
    if isinstance(given, list) and given:
        return {"messages": given, "tools": tools}
    if isinstance(given, dict) and given:
        if any(given.get(name) for name in ("messages", "prompt", "input", "contents")):
            return {"messages": given.get("contents"), "tools": tools} | given
        return {"messages": [given], "tools": tools}
    return None


def _usage(row: dict[str, Any]) -> LoggedUsage:
    """Newer exports count cached input separately; all counts whose names begin with "input" add up to the prompt."""
    details = unpacked(row.get("usageDetails") or row.get("usage_details"))
    if isinstance(details, dict) and details:
        counts = {name: count(value) or 0 for name, value in details.items()}
        cached = sum(number for name, number in counts.items() if "cache" in name and "creation" not in name)
        parts = [n for name, n in counts.items() if name.startswith(("input", "prompt", "cache_"))]
        output, total = (
            sum(n for name, n in counts.items() if name.startswith(("output", "completion"))),
            counts.get("total"),
        )
        prompt = total - output if total and total >= output else sum(parts)
        return LoggedUsage(prompt=prompt or None, output=output, cached=cached if cached else None)
    flat = {"prompt_tokens": row.get("promptTokens"), "completion_tokens": row.get("completionTokens")}
    usage = unpacked(row.get("usage"))
    if isinstance(usage, dict):
        flat = {"prompt_tokens": usage.get("input"), "completion_tokens": usage.get("output")} | usage
    return usage_in({"usage": flat})


def _as_openai(usage: LoggedUsage) -> dict[str, Any]:
    details = {} if usage.cached is None else {"cached_tokens": usage.cached}
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.output, "prompt_tokens_details": details}
