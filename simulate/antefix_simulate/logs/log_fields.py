"""Field names that logs use for times, token counts and users. All readers of logs use these names, so the names of all
programs are known to each reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from antefix.whole_number import whole_number

_TIMES: Final = (
    *("startTime", "start_time", "timestamp", "@timestamp", "created_at", "createdAt", "created", "time", "ts", "date"),
    *("request_time", "requested_at", "started_at"),
)
_USERS: Final = ("user", "user_id", "userId", "end_user", "safety_identifier")
_SESSIONS: Final = ("session_id", "sessionId", "conversation_id", "trace_id", "traceId")
# A larger count is an error: no model has such prompts.
_TOKENS_MAX: Final = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedUsage:
    """Counts that a provider reported; None: not reported. prompt: all tokens of the prompt, cached or not."""

    prompt: int | None = None
    output: int | None = None
    cached: int | None = None


def time_in(*rows: Any) -> float | None:
    """Unix seconds of the first time found in these objects, whatever its unit or format."""
    for row in rows:
        for name in _TIMES if isinstance(row, dict) else ():
            found = _seconds(row.get(name))
            if found is not None:
                return found
    return None


def user_in(*rows: Any) -> str:
    return _first_text(rows, _USERS)


def session_in(*rows: Any) -> str:
    return _first_text(rows, _SESSIONS)


def usage_in(*rows: Any) -> LoggedUsage:
    """The first `usage` found in these objects, in OpenAI's, Anthropic's or DeepSeek's format."""
    for row in rows:
        usage = row.get("usage") if isinstance(row, dict) else None
        if isinstance(usage, dict):
            found = _usage_of(usage)
            if found.prompt is not None or found.output is not None:
                return found
    return LoggedUsage()


def count(value: Any) -> int | None:
    """A number of tokens; None if the value is not a number of tokens."""
    if isinstance(value, str):
        value = whole_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if 0 <= value < _TOKENS_MAX else None


def _usage_of(usage: dict[str, Any]) -> LoggedUsage:
    output = _first_count(usage, ("completion_tokens", "output_tokens"))
    # Anthropic's input_tokens excludes tokens read from its cache or written to it.
    read, written = count(usage.get("cache_read_input_tokens")), count(usage.get("cache_creation_input_tokens"))
    uncached = count(usage.get("input_tokens"))
    if uncached is not None and (read is not None or written is not None):
        return LoggedUsage(prompt=uncached + (read or 0) + (written or 0), output=output, cached=read or 0)
    details: Any = next((usage[n] for n in ("prompt_tokens_details", "input_tokens_details") if usage.get(n)), {})
    cached = count(usage.get("prompt_cache_hit_tokens"))
    if cached is None and isinstance(details, dict):
        cached = count(details.get("cached_tokens"))
    return LoggedUsage(prompt=_first_count(usage, ("prompt_tokens", "input_tokens")), output=output, cached=cached)


def _first_count(values: dict[str, Any], names: Iterable[str]) -> int | None:
    return next((found for name in names if (found := count(values.get(name))) is not None), None)


def _first_text(rows: Iterable[Any], names: Iterable[str]) -> str:
    for row in rows:
        for name in names if isinstance(row, dict) else ():
            if isinstance(row.get(name), str | int) and row[name] != "":
                return str(row[name])
    return ""


def _seconds(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return _iso_seconds(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    # Larger numbers are nanoseconds, microseconds or milliseconds: as seconds they would be after the year 5138.
    for power in (1e9, 1e6, 1e3):
        if value >= 1e8 * power:
            return float(value) / power
    return float(value)


def _iso_seconds(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
