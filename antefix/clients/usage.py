"""What a request used, as clients see it."""

from __future__ import annotations

from dataclasses import dataclass

from antefix.v1 import usage_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request used; prompt_tokens = cache_hit_tokens + cache_miss_tokens."""

    request_id: str
    prompt_tokens: int
    cache_hit_tokens: int
    cache_miss_tokens: int
    output_tokens: int
    written_tokens: int
    ttft_s: float
    total_s: float


def usage_from_wire(message: usage_pb2.Usage) -> Usage:
    return Usage(
        request_id=message.request_id,
        prompt_tokens=message.prompt_tokens,
        cache_hit_tokens=message.cache_hit_tokens,
        cache_miss_tokens=message.cache_miss_tokens,
        output_tokens=message.output_tokens,
        written_tokens=message.written_tokens,
        ttft_s=message.ttft_s,
        total_s=message.total_s,
    )


def usage_to_wire(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        request_id=usage.request_id,
        prompt_tokens=usage.prompt_tokens,
        cache_hit_tokens=usage.cache_hit_tokens,
        cache_miss_tokens=usage.cache_miss_tokens,
        output_tokens=usage.output_tokens,
        written_tokens=usage.written_tokens,
        ttft_s=usage.ttft_s,
        total_s=usage.total_s,
    )
