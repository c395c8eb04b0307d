"""The report of one restore: where KV came from, what was computed, what it cost. Knows no tensors, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field

from antefix.miss_reason import MissReason
from antefix.usage import Usage, tiers_text


@dataclass(slots=True)
class RestoreReport:
    """The report is filled in while a prompt is processed. Hit tokens plus miss tokens equal the prompt's length.

    hit_tiers: the tokens of hit_store_tokens that each tier delivered, by the tier's label.
    write_error: why some computed KV could not be stored; empty: all of it was stored.
    """

    plan: str = "cold"
    hit_tokens: int = 0
    miss_tokens: int = 0
    hit_memory_tokens: int = 0
    hit_store_tokens: int = 0
    hit_tiers: dict[str, int] = field(default_factory=dict)
    replayed_tokens: int = 0
    written_tokens: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    miss_reason: MissReason = MissReason.NONE
    last_hit_hash: bytes = b""
    predicted_s: float = 0.0
    restore_s: float = 0.0
    compute_s: float = 0.0
    store_errors: int = 0
    write_error: str = ""

    def usage(
        self, prompt_tokens: int, *, output_tokens: int = 0, reasoning_tokens: int = 0, ttft_us: int = 0
    ) -> Usage:
        """The billed usage of a prompt of `prompt_tokens` tokens and its output."""
        return Usage(
            output_tokens=output_tokens,
            reasoning_tokens=reasoning_tokens,
            ttft_us=ttft_us,
            prompt_tokens=prompt_tokens,
            cache_hit_tokens=self.hit_tokens,
            hit_memory_tokens=self.hit_memory_tokens,
            # A tier list that does not add up is left out of the bill. It only says where tokens came from, not how
            # many.
            hit_tiers=tiers_text(self.hit_tiers) if sum(self.hit_tiers.values()) == self.hit_store_tokens else "",
            cache_write_tokens=min(self.written_tokens, prompt_tokens - self.hit_tokens),
            replayed_tokens=self.replayed_tokens,
            restore_plan=self.plan,
            last_hit_hash=self.last_hit_hash.hex() if self.hit_tokens else "",
            miss_reason=self.miss_reason,
        )
