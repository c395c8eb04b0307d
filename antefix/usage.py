"""What one request used: one form of its counts for the bill, prices, metrics and clients' answers.

The usage is converted only where it leaves the process: `antefix.wire` (protobuf), `antefix_billing.providers`
(OpenAI's and Anthropic's JSON) and `antefix_billing.usage_record` (the ledger's bytes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from antefix.miss_reason import MissReason


class Evidence(StrEnum):
    """The evidence for a hit's token count. The values of this enum are part of the ledger's format, so they are never
    renamed.
    """

    # The hash of the last block that was hit, which the store's log confirms.
    PROVED = ""
    # An engine's worker reported the count.
    REPORTED = "reported"
    # The router's expectation, because the answer of an engine's worker broke off before it reported a count.
    EXPECTED = "expected"
    # A newer peer sent a kind of evidence that this process does not know.
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> Evidence:
        return cls.UNKNOWN

    @property
    def label(self) -> str:
        """The tier's label in HTTP headers and metrics."""
        return self.value or "proved"


def tiers_text(tokens_by_tier: Mapping[str, int]) -> str:
    """The tokens of each tier as text, such as "disk:a=1024,peer:b=256". The tiers are sorted, so that equal counts
    give equal texts.
    """
    return ",".join(f"{tier}={tokens}" for tier, tokens in sorted(tokens_by_tier.items()) if tokens)


def tiers_of_text(text: str) -> dict[str, int]:
    """Raises:  ValueError: the text is not in the form of `tiers_text`."""
    rows = [row.rpartition("=") for row in text.split(",") if row]
    return {tier: int(tokens) for tier, _, tokens in rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request used. prompt_tokens = cache_hit_tokens + cache_miss_tokens.

    hit_memory_tokens: the part of the hit that was in a worker's memory; the rest came from the store.
    hit_tiers: how many of hit_store_tokens each tier delivered, as `tiers_text` writes it; empty: not known.
    cache_write_tokens: prompt tokens that were newly stored; part of the miss.
    output_write_tokens: output tokens that were newly stored.
    cache_write_1h_tokens: the part of cache_write_tokens that the client asked to keep for an hour or longer.
    output_tokens: tokens sent to the client.  reasoning_tokens: the part of them that is reasoning.
    replayed_tokens: tokens that were run again to rebuild window state; billed as hits.
    last_hit_hash: the hash, in hex, of the last block that was hit; it is the evidence of the hit.
    ttft_us: microseconds to the first token.
    evidence: the evidence for the hit's token count.
    worker: in a fleet of engines, the worker that answered.  expected_hit_tokens: the hit that the router expected.
    """

    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    hit_memory_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    output_write_tokens: int = 0
    replayed_tokens: int = 0
    restore_plan: str = ""
    last_hit_hash: str = ""
    miss_reason: MissReason = MissReason.NONE
    ttft_us: int = 0
    evidence: Evidence = Evidence.PROVED
    worker: str = ""
    expected_hit_tokens: int = 0
    hit_tiers: str = ""
    cache_write_1h_tokens: int = 0

    @property
    def cache_miss_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.cache_hit_tokens

    @property
    def hit_store_tokens(self) -> int:
        """The part of the hit that came from the store."""
        return self.cache_hit_tokens - self.hit_memory_tokens

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """The hit tokens by source: The place that tokens came from: "memory", or the label of a tier, such as
        "peer:rack-2".
        """
        stored = tiers_of_text(self.hit_tiers) or {"store": self.hit_store_tokens}
        return {tier: tokens for tier, tokens in {"memory": self.hit_memory_tokens, **stored}.items() if tokens}

    @property
    def written_tokens(self) -> int:
        """Tokens of prompt and output that were newly stored."""
        return self.cache_write_tokens + self.output_write_tokens

    @property
    def ttft_s(self) -> float:
        return self.ttft_us / 1e6
