"""Tests whether hits are faster than misses. If an endpoint reports no hits, time is the only sign of a cache."""

from __future__ import annotations

import statistics

from antefix_console.audit.finding import Finding, Verdict, fact
from antefix_console.audit.probing import Probing
from antefix_console.audit.significance import ALPHA, hits_are_faster

PROBE = "timing"


def num_requests(samples: int) -> int:
    return 2 * samples


async def find_timing(probing: Probing) -> list[Finding]:
    cold, resent = [], []
    for _ in range(probing.samples):
        prompt = probing.fresh_prompt()
        cold.append(await probing.ask(prompt))
        resent.append(await probing.ask(prompt))
    p_value = hits_are_faster([each.ttft_s for each in resent], [each.ttft_s for each in cold])
    medians = [statistics.median(each.ttft_s for each in replies) for replies in (cold, resent)]
    num_reported = sum(1 for each in resent if each.usage.cached_tokens)
    figures = {
        "cold_ttft_ms": round(1e3 * medians[0], 2),
        "resent_ttft_ms": round(1e3 * medians[1], 2),
        "hits_reported": num_reported,
    }
    faster = p_value < ALPHA
    if faster and not num_reported:
        says = "resent prompts are faster though no hit is reported: there is a cache"
    elif faster:
        says = f"resent prompts have their first token {medians[0] / medians[1]:.1f} times as soon"
    elif num_reported:
        says = "hits are reported, but resent prompts are not measurably faster"
    else:
        says = "no sign of a cache in times"
    finding = fact(PROBE, says, **figures)
    return [
        Finding(
            probe=PROBE,
            verdict=Verdict.FACT,
            says=says,
            figures=finding.figures,
            p_value=p_value,
            samples=probing.samples,
        )
    ]
