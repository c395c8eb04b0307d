"""The promises by which an endpoint is judged: its provider's documented rules, one table row per provider."""

from __future__ import annotations

from dataclasses import dataclass, replace

from antefix.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """hit_unit_tokens: each hit is a multiple of this (1: any number).  smallest_hit_tokens: no hit is smaller.

    users_apart: end users (`user`, `metadata.user_id`) do not share a cache. keys_apart: API keys (accounts) do not
    share one. salts_apart: requests with different `cache_salt`s do not share one. retries_once: a retry with the same
    Idempotency-Key gets the same answer and is billed once. lifetime_s: a prefix hits for at least this time after its
    last use; 0: no promise.
    """

    name: str
    hit_unit_tokens: int = 1
    smallest_hit_tokens: int = 0
    users_apart: bool = False
    keys_apart: bool = True
    salts_apart: bool = True
    retries_once: bool = False
    lifetime_s: float = 0.0
    source: str = ""


PROVIDERS: dict[str, Promises] = {
    each.name: each
    for each in (
        Promises(name="any", source="what holds for every cache: hits are part of the prompt, accounts are apart"),
        Promises(
            name="antefix",
            users_apart=True,
            retries_once=True,
            source="docs/HTTP_API.md of Antefix; hits end at a block of the model",
        ),
        Promises(
            name="openai",
            hit_unit_tokens=128,
            smallest_hit_tokens=1024,
            lifetime_s=300.0,
            source="OpenAI's guide on prompt caching: 1,024 tokens or more, steps of 128, kept 5 to 10 minutes",
        ),
        Promises(
            name="anthropic",
            smallest_hit_tokens=1024,
            lifetime_s=300.0,
            source="Anthropic's guide on prompt caching: 1,024 tokens or more, 5 minutes, refreshed by use",
        ),
        Promises(
            name="deepseek",
            hit_unit_tokens=64,
            smallest_hit_tokens=64,
            source="DeepSeek's guide on context caching: units of 64 tokens, best effort",
        ),
    )
}


def promises_of(name: str, *, lifetime_s: float | None = None) -> Promises:
    """lifetime_s: used in place of the lifetime in the provider's row.

    Raises:  InvalidRequest: an unknown name.
    """
    if name not in PROVIDERS:
        raise InvalidRequest(f"unknown provider {name!r}: use one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name] if lifetime_s is None else replace(PROVIDERS[name], lifetime_s=lifetime_s)
