"""Explains in sentences why a request hit or missed, from its record alone."""

from __future__ import annotations

from typing import Final

from antefix.miss_reason import MissReason
from antefix.usage import tiers_of_text
from antefix_billing.usage_record import UsageRecord

_WHY: Final[dict[MissReason, str]] = {
    MissReason.FIRST_SEEN: "They were never stored, or so long ago that the store has forgotten them.",
    MissReason.EVICTED: "They were stored, and evicted for room. A larger store would have kept them.",
    MissReason.EXPIRED: "They were stored, and their time to live was over.",
    MissReason.WINDOW_MISSING: "They are stored, but computing them again was predicted faster.",
    MissReason.BELOW_MINIMUM: "The prompt has no whole block and a token more, so there is nothing to look up.",
    MissReason.FINGERPRINT_DIFFERS: "They are stored for other weights or settings.",
    MissReason.ARITHMETIC_DIFFERS: "They are stored by a set-up whose arithmetic rounds differently.",
    MissReason.CORRUPT: "They were stored, but damaged. They have been set aside and computed again.",
    MissReason.STORE_UNAVAILABLE: "The store did not answer.",
    MissReason.STORE_LATE: "The store did not answer in its usual time, and computing them ended sooner.",
    MissReason.UNREACHABLE: "They are stored behind a block that is not.",
    MissReason.LOST_HIT: "The worker's events said that it has them, and it did not hit them.",
    MissReason.OTHER_WORKER: "Another worker has them; this one was chosen because it has less to do.",
    MissReason.UNKNOWN: "The worker gave a reason that this router does not know: it is newer.",
}
_PLANS: Final = {
    "cold": "Nothing was restored.",
    "checkpoint": "It continued from a stored checkpoint of window state.",
    "replay": "Window state was rebuilt exactly by running the hit's last tokens again.",
    "handoff": "It continued from where another worker had stopped.",
}


def explained(record: UsageRecord) -> list[str]:
    """The explanation has one sentence per fact, the most important first."""
    hit, prompt = record.cache_hit_tokens, record.prompt_tokens
    if not prompt:
        return ["No worker has begun on it."]
    said = [f"{hit:,} of {prompt:,} prompt tokens hit ({100 * hit / prompt:.1f}%)."]
    if record.worker:
        said.append(f"That is what the worker {record.worker} reported; {record.expected_hit_tokens:,} were expected.")
    elif hit:
        said.append(
            f"{record.hit_memory_tokens:,} of them were in a worker's memory, {record.hit_store_tokens:,} in the store."
        )
        if record.hit_tiers.count("=") > 1:
            stored = (f"{tokens:,} in {tier}" for tier, tokens in tiers_of_text(record.hit_tiers).items())
            said.append(f"Of those in stores: {', '.join(stored)}.")
    if plan := _PLANS.get(record.restore_plan):
        said.append(plan)
    if record.replayed_tokens:
        said.append(f"{record.replayed_tokens:,} tokens were run again for that; they count as hits.")
    if record.miss_reason in _WHY:
        said.append(f"The first tokens that missed: {_WHY[record.miss_reason]}")
    if record.prefix_volatile:
        said.append("The client's prompts begin with something that changes, so all behind it misses.")
    if record.write_error:
        said.append(f"Not all of its KV could be stored: {record.write_error}.")
    if record.detail:
        said.append(f"It ended with {record.detail}.")
    return said
