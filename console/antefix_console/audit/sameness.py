"""Tests whether a hit changes the answer: compares cold runs with hits, and hits with hits (text and log
probabilities).

Two runs of one prompt may differ without any cache (batching, other kernels). So a hit counts as changing the answer
only if cold and hit differ more often, or by more, than two hits of the same prompt do.
"""

from __future__ import annotations

from collections.abc import Sequence

from antefix_console.audit.finding import Finding, Verdict, unknown
from antefix_console.audit.probing import Probing
from antefix_console.audit.significance import happens_more_often, is_larger
from antefix_console.endpoint.reply import Reply

PROBE = "sameness"
_OUTPUT_TOKENS = 16
# An audit has one such test, so no correction for many comparisons is needed.
_ALPHA = 1e-3


def num_requests(samples: int) -> int:
    return 3 * samples


async def find_sameness(probing: Probing) -> list[Finding]:
    cold_to_hit, hit_to_hit = _Pairs(), _Pairs()
    with_logprobs = True
    for _ in range(probing.samples):
        prompt = probing.fresh_prompt()
        replies = []
        for _ in range(3):
            reply = await _ask(probing, prompt, with_logprobs)
            if not reply.ok and with_logprobs:
                # Not every endpoint gives log probabilities.
                with_logprobs = False
                reply = await _ask(probing, prompt, with_logprobs)
            replies.append(reply)
        if not all(reply.ok for reply in replies):
            return [unknown(PROBE, f"the endpoint refuses such requests ({replies[-1].error})")]
        cold, hit, again = replies
        if not hit.usage.cached_tokens or not again.usage.cached_tokens:
            continue
        cold_to_hit.add(cold, hit)
        hit_to_hit.add(hit, again)
    compared = len(cold_to_hit.differs)
    if not compared:
        return [unknown(PROBE, f"none of {probing.samples} resent prompts hit, so there is nothing to compare")]
    num, control = sum(cold_to_hit.differs), sum(hit_to_hit.differs)
    p_text = happens_more_often(num, compared, control, compared)
    p_logprobs = is_larger(cold_to_hit.distances, hit_to_hit.distances) if cold_to_hit.distances else 1.0
    figures = {
        "texts_that_differ": num,
        "texts_that_differ_between_hits": control,
        "logprobs_compared": len(cold_to_hit.distances),
        "largest_logprob_difference": max(cold_to_hit.distances, default=None),
        "largest_between_hits": max(hit_to_hit.distances, default=None),
    }
    p_value = min(1.0, 2 * min(p_text, p_logprobs))
    if p_value < _ALPHA:
        says = f"a hit changes the answer: {num} of {compared} texts differ from cold, {control} between two hits"
        return [
            Finding(
                probe=PROBE, verdict=Verdict.VIOLATION, says=says, figures=figures, p_value=p_value, samples=compared
            )
        ]
    says = f"{compared - num} of {compared} hits give the cold run's text"
    if cold_to_hit.distances and max(cold_to_hit.distances) == 0:
        says += ", and its log probabilities to the last digit"
    return [Finding(probe=PROBE, verdict=Verdict.FACT, says=says, figures=figures, p_value=p_value, samples=compared)]


class _Pairs:
    """differs: for each pair, whether the texts differ.  distances: for each pair, the largest log probability
    difference.
    """

    def __init__(self) -> None:
        self.differs: list[bool] = []
        self.distances: list[float] = []

    def add(self, one: Reply, other: Reply) -> None:
        self.differs.append(one.text != other.text)
        if one.logprobs and other.logprobs:
            self.distances.append(_distance(one.logprobs, other.logprobs))


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=False))


async def _ask(probing: Probing, prompt: str, with_logprobs: bool) -> Reply:
    return await probing.sender.ask(probing.scope, prompt, max_tokens=_OUTPUT_TOKENS, logprobs=with_logprobs)
