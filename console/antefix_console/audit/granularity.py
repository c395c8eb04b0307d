"""Measures the smallest hit, the step in which hits grow, and how much prompts with a common beginning share."""

from __future__ import annotations

import math

from antefix_console.audit.finding import Finding, fact, unknown
from antefix_console.audit.probing import Probing

PROBE = "granularity"
# A prompt may have to be sent more than once, or be some time old, before it hits.
_TRIES = 3
_WAIT_S = 2.0
_LENGTHS, _FORKS = 6, 6
# Steps of the search for the smallest hit; each step costs three requests.
_SEARCH_STEPS = 6

NUM_REQUESTS = (1 + _TRIES) + _SEARCH_STEPS * 3 + _LENGTHS * 2 + 2 * _FORKS


async def find_granularity(probing: Probing) -> list[Finding]:
    # 1. Does a resent prompt hit at all?
    prompt = probing.fresh_prompt()
    cold = await probing.ask(prompt)
    if not cold.usage.reports_hits:
        return [unknown(PROBE, "the endpoint reports no hit tokens: only times can tell (see timing)")]
    cached = await _hit_tokens(probing, prompt)
    if not cached:
        return [fact(PROBE, "a resent prompt does not hit", prompt_tokens=cold.usage.prompt_tokens, tries=_TRIES)]
    findings = [
        fact(
            PROBE,
            f"a resent prompt of {cold.usage.prompt_tokens} tokens hits {cached}",
            prompt_tokens=cold.usage.prompt_tokens,
            hit_tokens=cached,
        )
    ]
    # 2. The smallest hit, found by halving the length.
    smallest = await _smallest(probing)
    findings.append(fact(PROBE, f"the smallest hit that was seen has {min(smallest)} tokens", hits=sorted(smallest)))
    # 3. The step: the number of which all hits are multiples.
    seen = [cached, *smallest, *await _of_many_lengths(probing)]
    step = math.gcd(*seen)
    findings.append(fact(PROBE, f"all {len(seen)} hits are multiples of {step} tokens", step_tokens=step, hits=seen))
    # 4. Prompts that share a beginning.
    return [*findings, *await _forks(probing)]


async def _hit_tokens(probing: Probing, prompt: str) -> int:
    """The tokens that a prompt hits after it was sent before; 0 if the prompt still misses after some tries."""
    for attempt in range(_TRIES):
        reply = await probing.ask(prompt)
        if reply.usage.cached_tokens:
            return reply.usage.cached_tokens
        if attempt < _TRIES - 1:
            await probing.sender.sleep(_WAIT_S)
    return 0


async def _smallest(probing: Probing) -> list[int]:
    """Hits of shorter and shorter prompts, until one does not hit."""
    hits, too_short, enough = [], 0, probing.prompt_words
    for _ in range(_SEARCH_STEPS):
        num_words = max(1, (too_short + enough) // 2)
        prompt = probing.fresh_prompt(num_words)
        await probing.ask(prompt)
        reply = await probing.ask(prompt)
        if cached := reply.usage.cached_tokens:
            hits.append(cached)
            enough = num_words
        else:
            too_short = num_words
    return hits or [0]


async def _of_many_lengths(probing: Probing) -> list[int]:
    hits = []
    for number in range(_LENGTHS):
        # Lengths that have no common factor with the block size.
        prompt = probing.fresh_prompt(probing.prompt_words - 7 * number - 1)
        await probing.ask(prompt)
        hits.append((await probing.ask(prompt)).usage.cached_tokens)
    return [hit for hit in hits if hit] or [0]


async def _forks(probing: Probing) -> list[Finding]:
    """Send one prompt, then others that differ from it from several positions on."""
    rows = []
    for number in range(1, _FORKS + 1):
        trunk = probing.fresh_prompt()
        await probing.ask(trunk)
        num_shared = probing.prompt_words * number // (_FORKS + 1)
        shared = " ".join(trunk.split(" ")[:num_shared]) + " "
        fork = shared + probing.fresh_prompt(probing.prompt_words - num_shared)
        reply = await probing.ask(fork)
        rows.append(
            {"shared_tokens": round(probing.tokens_before(num_shared)), "hit_tokens": reply.usage.cached_tokens}
        )
    num_hit = sum(1 for row in rows if row["hit_tokens"])
    lost = [row["shared_tokens"] - row["hit_tokens"] for row in rows if row["hit_tokens"]]
    if num_hit:
        says = f"{num_hit} of {len(rows)} forks inside a prompt hit, at most {max(lost)} tokens before the fork"
    else:
        says = f"none of {len(rows)} forks inside a prompt hits: only whole earlier prompts do"
    return [fact("forks", says, forks=rows)]
