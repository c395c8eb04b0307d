"""Compares the hit rate on a conversation-like trace with the best one that the endpoint's granularity allows."""

from __future__ import annotations

from antefix_console.audit.finding import Finding, fact, unknown
from antefix_console.audit.probing import Probing
from antefix_console.load.prompt_text import prompt_text
from antefix_simulate.generated_traces import generate

PROBE = "trace"
NUM_REQUESTS = 40
# The generated trace keeps its shape but gets the length of the audit's prompts, so that a unit is still several words.
_UNIT_TOKENS = 1024


async def find_ideal(probing: Probing) -> list[Finding]:
    """Send the requests one after the other, so that every earlier prompt could be in the cache."""
    trace = generate("agents", num_requests=NUM_REQUESTS, unit_tokens=_UNIT_TOKENS, seed=1)
    assert probing.sender.rate is not None
    usual = sorted(request.num_tokens for request in trace.requests)[NUM_REQUESTS // 2]
    scale = min(1.0, probing.tokens_of(probing.prompt_words) / usual)
    seen: set[int] = set()
    ideal = hits = total = 0.0
    for number, request in enumerate(trace.requests):
        text = prompt_text(
            request,
            number=number,
            unit_tokens=_UNIT_TOKENS,
            scale=scale,
            rate=probing.sender.rate,
            salt=probing.seed,
        )
        reply = await probing.ask(text)
        names = request.names.tolist()
        known = next((index for index, name in enumerate(names) if name not in seen), len(names))
        seen.update(names)
        ideal += reply.usage.prompt_tokens * known * _UNIT_TOKENS / request.num_tokens
        hits += reply.usage.cached_tokens
        total += reply.usage.prompt_tokens
    figures = {"prompt_tokens": total, "hit_tokens": hits, "ideal_hit_tokens": round(ideal)}
    if not ideal:
        return [unknown(PROBE, "the trace has nothing to hit", **figures)]
    says = f"{100 * hits / total:.1f}% of an agent's {total:,.0f} prompt tokens hit; all that were sent before are "
    return [fact(PROBE, says + f"{100 * ideal / total:.1f}%", **figures)]
