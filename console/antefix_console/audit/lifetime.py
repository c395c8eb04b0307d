"""Measures how long a prefix still hits after its last use, by sending it again after several waits."""

from __future__ import annotations

from antefix_console.audit.finding import Finding, Verdict, fact, unknown
from antefix_console.audit.probing import Probing
from antefix_console.audit.significance import happens_more_often

PROBE = "lifetime"
# Prompts per wait. If ten of ten hit at once and none of ten after the wait, p = 5e-6.
PROMPTS_PER_WAIT = 10
# Below this p-value the result of one wait is not chance. There are few waits, and a miss is a reported count, not a
# time.
_ALPHA = 1e-4


def num_requests(waits_s: tuple[float, ...]) -> int:
    return 2 * PROMPTS_PER_WAIT * (len(waits_s) + 1)


async def find_lifetime(probing: Probing, waits_s: tuple[float, ...]) -> list[Finding]:
    """waits_s: waits in seconds. Each waiting time has prompts of its own. All waits run at the same time, so the
    longest wait decides how long the probe takes.
    """
    sender = probing.sender
    # 1. The control: prompts sent again at once.
    at_once = await _hits_after(probing, [probing.fresh_prompt() for _ in range(PROMPTS_PER_WAIT)], first=True)
    if at_once == 0:
        return [unknown(PROBE, "prompts do not even hit when they are sent again at once")]
    # 2. Send all prompts, then send each again after its wait.
    sent = []
    for wait_s in sorted(waits_s):
        prompts = [probing.fresh_prompt() for _ in range(PROMPTS_PER_WAIT)]
        for prompt in prompts:
            await probing.ask(prompt)
        sent.append((wait_s, sender.clock(), prompts))
    rows = []
    for wait_s, at, prompts in sent:
        await sender.sleep(max(0.0, at + wait_s - sender.clock()))
        waited_s = sender.clock() - at
        rows.append({"waited_s": round(waited_s, 1), "hits": await _hits_after(probing, prompts, first=False)})
    # 3. Compare the longest wait after which most prompts still hit with the promise.
    alive = [row["waited_s"] for row in rows if row["hits"] * 2 > PROMPTS_PER_WAIT]
    longest = f"most prompts still hit after {max(alive):.0f} s" if alive else "most prompts are gone after each wait"
    findings = [fact(PROBE, f"{longest} ({PROMPTS_PER_WAIT} prompts per wait)", waits=rows, hits_at_once=at_once)]
    promised_s = sender.promises.lifetime_s
    for row in rows:
        if row["waited_s"] > promised_s:
            continue
        misses = PROMPTS_PER_WAIT - int(row["hits"])
        p_value = happens_more_often(misses, PROMPTS_PER_WAIT, PROMPTS_PER_WAIT - at_once, PROMPTS_PER_WAIT)
        if p_value < _ALPHA:
            findings.append(
                Finding(
                    probe=PROBE,
                    verdict=Verdict.VIOLATION,
                    says=f"{misses} of {PROMPTS_PER_WAIT} prompts are gone after {row['waited_s']:.0f} s; "
                    f"{promised_s:.0f} s were promised",
                    figures=dict(row),
                    p_value=p_value,
                    samples=PROMPTS_PER_WAIT,
                )
            )
    return findings


async def _hits_after(probing: Probing, prompts: list[str], *, first: bool) -> int:
    """How many of the prompts hit now. first: whether each prompt is sent once before."""
    if first:
        for prompt in prompts:
            await probing.ask(prompt)
    replies = [await probing.ask(prompt) for prompt in prompts]
    return sum(1 for reply in replies if reply.usage.cached_tokens)
