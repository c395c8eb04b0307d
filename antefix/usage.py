"""What one request used: the one form of its counts, for the bill, prices, metrics and clients' answers.

Conversions are at the wire only: `antefix.wire` (protobuf), `antefix_billing.providers` (OpenAI's and Anthropic's JSON)
and `antefix_billing.usage_record` (the ledger's bytes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from antefix.miss_reason import MissReason


class Evidence(StrEnum):
    """What a hit's count rests on. Values are part of the ledger's format: never renamed."""

    # The hash of the last block that was hit, which the store's log confirms.
    PROVED = ""
    # The word of a worker that is not ours.
    REPORTED = "reported"
    # What the router expected of such a worker, whose answer broke off before it said.
    EXPECTED = "expected"
    # A newer peer's, which this process does not know.
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> Evidence:
        return cls.UNKNOWN

    @property
    def label(self) -> str:
        """For headers and metrics."""
        return self.value or "proved"


def tiers_text(tokens_by_tier: Mapping[str, int]) -> str:
    """Such as "disk:a=1024,peer:b=256", sorted: one text per account."""
    return ",".join(f"{tier}={tokens}" for tier, tokens in sorted(tokens_by_tier.items()) if tokens)


def tiers_of_text(text: str) -> dict[str, int]:
    """Raises:  ValueError: not what `tiers_text` writes."""
    rows = [row.rpartition("=") for row in text.split(",") if row]
    return {tier: int(tokens) for tier, _, tokens in rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request used. prompt_tokens = cache_hit_tokens + cache_miss_tokens.

    hit_memory_tokens: the part of the hit that was in a worker's memory; the rest came from the store.
    hit_tiers: of hit_store_tokens, which tier gave how many, as `tiers_text` writes it; empty where that is not known.
    cache_write_tokens: of the prompt, newly stored; part of the miss.  output_write_tokens: of the output.
    cache_write_1h_tokens: of cache_write_tokens, those that the client asked to keep for an hour or longer.
    output_tokens: those given to the client.  reasoning_tokens: part of them.
    replayed_tokens: run again to rebuild window state, billed as hits.
    last_hit_hash: hex hash of the last block that was hit: the evidence.
    ttft_us: microseconds to the first token.
    evidence: what the hit's count rests on.
    worker: of a fleet that is not ours, which one answered.  expected_hit_tokens: what the router thought it would hit.
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
        """The hit, by where it came from: "memory", and labels of tiers, such as "peer:rack-2"."""
        stored = tiers_of_text(self.hit_tiers) or {"store": self.hit_store_tokens}
        return {tier: tokens for tier, tokens in {"memory": self.hit_memory_tokens, **stored}.items() if tokens}

    @property
    def written_tokens(self) -> int:
        """Newly stored, of prompt and output."""
        return self.cache_write_tokens + self.output_write_tokens

    @property
    def ttft_s(self) -> float:
        return self.ttft_us / 1e6
