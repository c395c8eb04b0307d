"""Writes what is left of a tenant's limits into the headers that OpenAI's and Anthropic's clients read. Pure.

Source: platform.openai.com, "Rate limits" (headers); docs.claude.com, "Rate limits" (response headers).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from antefix_billing.limits import LimitPassed, LimitState
from antefix_router.gateway.http_errors import Provider


def limit_headers(states: dict[LimitPassed, LimitState | None], provider: Provider, now: datetime) -> dict[str, str]:
    """Headers for a tenant's limits on requests and on tokens, if there are any."""
    headers: dict[str, str] = {}
    for what, state in states.items():
        if state is None:
            continue
        if provider is Provider.ANTHROPIC:
            reset = (now + timedelta(seconds=state.reset_s)).isoformat(timespec="seconds").replace("+00:00", "Z")
            named = {"limit": str(state.limit), "remaining": str(state.remaining), "reset": reset}
            headers |= {f"anthropic-ratelimit-{what}-{name}": value for name, value in named.items()}
        else:
            named = {"limit": str(state.limit), "remaining": str(state.remaining), "reset": duration(state.reset_s)}
            headers |= {f"x-ratelimit-{name}-{what}": value for name, value in named.items()}
    return headers


def duration(seconds: float) -> str:
    """A duration in OpenAI's notation: 250ms, 1s, 6m0s, 1h0m0s."""
    if seconds < 1:
        return f"{round(1000 * seconds)}ms"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"
