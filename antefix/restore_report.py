"""The account of one restore: where KV came from, what was computed, what it cost. Knows no tensors, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass

from antefix.miss_reason import MissReason


@dataclass(slots=True)
class RestoreReport:
    """Filled while a prompt is worked on. hit + miss is the prompt's length; the tiers add up to hit_tokens.

    write_error: why what was computed could not all be stored; empty where it was.
    """

    plan: str = "cold"
    hit_tokens: int = 0
    miss_tokens: int = 0
    hit_memory_tokens: int = 0
    hit_store_tokens: int = 0
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
