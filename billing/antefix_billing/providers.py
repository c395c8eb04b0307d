"""Writes a request's token counts as the `usage` object of each provider's API. Pure; docs/BILLING.md has the table.

    DeepSeek    prompt_tokens = hit + miss, as two disjoint halves
    OpenAI      cached_tokens is a part of prompt_tokens (input_tokens in the Responses API)
    Anthropic   input, cache creation and cache read exclude one another; their sum is the prompt

Sources: api-docs.deepseek.com (create chat completion), platform.openai.com (usage objects), docs.claude.com (prompt
caching). A cost formula counts tokens twice if it reads one provider's fields by another provider's rule.
"""

from __future__ import annotations

from typing import Any

from antefix.usage import Usage


def chat_usage(used: Usage) -> dict[str, Any]:
    """`usage` of /v1/chat/completions and /v1/completions: OpenAI's fields together with DeepSeek's."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.output_tokens,
        "total_tokens": used.prompt_tokens + used.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": used.cache_hit_tokens,
            "cache_write_tokens": used.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "prompt_cache_hit_tokens": used.cache_hit_tokens,
        "prompt_cache_miss_tokens": used.cache_miss_tokens,
    }


def responses_usage(used: Usage) -> dict[str, Any]:
    """`usage` of /v1/responses."""
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": used.cache_hit_tokens,
            "cache_write_tokens": used.cache_write_tokens,
        },
        "output_tokens": used.output_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.output_tokens,
    }


def messages_usage(used: Usage) -> dict[str, Any]:
    """`usage` of /v1/messages. Newly stored tokens count as cache creation and not as input.

    Anthropic's clients know two lifetimes. Tokens that a breakpoint asked to keep for an hour or longer are counted
    under one hour. All other written tokens are counted under five minutes; they stay as long as the store has room.
    """
    return {
        "input_tokens": used.cache_miss_tokens - used.cache_write_tokens,
        "cache_creation_input_tokens": used.cache_write_tokens,
        "cache_read_input_tokens": used.cache_hit_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": used.cache_write_tokens - used.cache_write_1h_tokens,
            "ephemeral_1h_input_tokens": used.cache_write_1h_tokens,
        },
        "output_tokens": used.output_tokens,
    }
