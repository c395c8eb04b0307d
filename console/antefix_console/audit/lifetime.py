"""How long a prefix hits after its last use, by asking again after several waits."""

from __future__ import annotations

from antefix_console.audit.finding import Finding, Verdict, fact, unknown
from antefix_console.audit.probing import Probing
from antefix_console.audit.significance import happens_more_often

PROBE = "lifetime"
# Prompts per wait. Ten misses of ten, where ten of ten hit at once, have p = 5e-6.
PROMPTS_PER_WAIT = 10
# Beyond chance for one wait: there are few of them, and each miss is a reported count, not a time.
_ALPHA = 1e-4


def num_requests(waits_s: tuple[float, ...]) -> int:
    return 2 * PROMPTS_PER_WAIT * (len(waits_s) + 1)


async def find_lifetime(probing: Probing, waits_s: tuple[float, ...]) -> list[Finding]:
    """waits_s: seconds, each tried with prompts of its own; all waits run side by side, so it takes the longest."""
    sender = probing.sender
    # 1. The control: asked again at once.
    at_once = await _hits_after(probing, [probing.fresh_prompt() for _ in range(PROMPTS_PER_WAIT)], first=True)
    if at_once == 0:
        return [unknown(PROBE, "prompts do not even hit when they are sent again at once")]
    # 2. Send all, then come back for each.
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
    # 3. The longest wait after which most still hit, and what was promised.
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
    """How many of them hit now. first: send them once before."""
    if first:
        for prompt in prompts:
            await probing.ask(prompt)
    replies = [await probing.ask(prompt) for prompt in prompts]
    return sum(1 for reply in replies if reply.usage.cached_tokens)
