"""Tests whether one caller hits what another caller has sent: by reported hits, or by times where none are reported."""

from __future__ import annotations

from dataclasses import replace

from antefix_console.audit.finding import Finding, Verdict, fact, unknown
from antefix_console.audit.probing import Probing
from antefix_console.audit.sender import Scope
from antefix_console.audit.significance import ALPHA, happens_more_often, hits_are_faster

PROBE = "isolation"


def num_requests(samples: int) -> int:
    # Three boundaries; each takes requests by the other caller, by the first one again, and fresh prompts.
    return 3 * 3 * samples


async def find_isolation(probing: Probing) -> list[Finding]:
    scope, promises = probing.scope, probing.sender.promises
    findings = []
    # 1. End users of one account, 2. cache salts, 3. accounts.
    users = [replace(scope, name=f"user {name}", user=f"audit-{name}", prompts=[]) for name in ("a", "b")]
    findings += await _wall(probing, "end users", users, promised=promises.users_apart)
    salts = [replace(scope, name=f"salt {name}", salt=f"audit-{name}", prompts=[]) for name in ("a", "b")]
    findings += await _wall(probing, "cache salts", salts, promised=promises.salts_apart)
    if probing.other_key is None:
        findings.append(unknown(PROBE, "accounts: needs a second API key (--other-key-file)"))
    else:
        findings += await _wall(probing, "accounts", [scope, probing.other_key], promised=promises.keys_apart)
    return findings


async def _wall(probing: Probing, what: str, callers: list[Scope], *, promised: bool) -> list[Finding]:
    """Test one boundary: the second caller sends the first caller's prompts. As a control, the first caller sends its
    prompts again, and prompts that nobody sent before are sent.
    """
    first, second = callers
    crossed, again, fresh = [], [], []
    for _ in range(probing.samples):
        prompt = probing.fresh_prompt()
        reply = await probing.ask(prompt, scope=first)
        if not reply.ok:
            return [unknown(PROBE, f"{what}: the endpoint refuses such a request ({reply.error})")]
        crossed.append(await probing.ask_as(second, prompt, after=first))
        again.append(await probing.ask(prompt, scope=first))
        fresh.append(reply)
    failed = [each for each in (*crossed, *again) if not each.ok]
    if failed:
        return [unknown(PROBE, f"{what}: {len(failed)} requests were refused ({failed[0].error})")]
    # Hits on a system prompt that all callers share are no leak: count hits beyond those of fresh prompts only.
    shared_by_all = max(each.usage.cached_tokens for each in fresh)
    num_crossed = sum(1 for each in crossed if each.usage.cached_tokens > shared_by_all)
    num_again = sum(1 for each in again if each.usage.cached_tokens > shared_by_all)
    # Where no hits are reported, times may show them: are the second caller's answers faster than those to fresh
    # prompts?
    p_time = hits_are_faster([each.ttft_s for each in crossed], [each.ttft_s for each in fresh])
    # The control: are real hits faster than misses? If times cannot tell them apart, times prove nothing here.
    p_control = hits_are_faster([each.ttft_s for each in again], [each.ttft_s for each in fresh])
    p_value = happens_more_often(num_crossed, len(crossed), 0, len(fresh)) if num_crossed else 1.0
    figures = {
        "hits_across": num_crossed,
        "hits_of_the_sender": num_again,
        "p_faster_across": p_time,
        "p_faster_for_the_sender": p_control,
    }
    shared = num_crossed > 0 or p_time < ALPHA
    how = f"{num_crossed} of {len(crossed)} prompts" if num_crossed else "seen by times alone"
    if shared and promised:
        return [
            Finding(
                probe=PROBE,
                verdict=Verdict.VIOLATION,
                says=f"{what} share a cache: one caller hits what another has sent ({how})",
                figures=figures,
                p_value=p_value if num_crossed else p_time,
                samples=len(crossed),
            )
        ]
    if shared:
        return [fact(PROBE, f"{what} share a cache ({how}); nothing else was promised", **figures)]
    if num_again == 0 and p_control >= ALPHA:
        return [unknown(PROBE, f"{what}: even the sender's own prompts do not hit, so nothing can be told", **figures)]
    return [fact(PROBE, f"{what} are apart: 0 of {len(crossed)} prompts hit across", **figures)]
