"""Tests whether a retry with the same Idempotency-Key gets the same answer, or a second answer that is billed again."""

from __future__ import annotations

import secrets

from antefix_console.audit.finding import Finding, Verdict, fact, unknown
from antefix_console.audit.probing import Probing
from antefix_console.endpoint.reply import Question

PROBE = "retries"
_SAMPLES = 5

NUM_REQUESTS = 2 * _SAMPLES


async def find_retries(probing: Probing) -> list[Finding]:
    scope, num_same, doubled = probing.scope, 0, []
    for _ in range(_SAMPLES):
        question = Question(
            prompt=probing.fresh_prompt(),
            max_tokens=4,
            user=scope.user,
            idempotency_key=f"audit-{secrets.token_hex(8)}",
        )
        first = await probing.sender.send(scope, question)
        second = await probing.sender.send(scope, question)
        if not (first.ok and second.ok and first.answer_id and second.answer_id):
            return [
                unknown(PROBE, f"the endpoint names no answers, or refuses a retry ({first.error or second.error})")
            ]
        if first.answer_id == second.answer_id and first.usage == second.usage:
            num_same += 1
        else:
            doubled.append(f"{first.answer_id}, {second.answer_id}")
    if num_same == _SAMPLES:
        return [
            fact(PROBE, "a retry with the same Idempotency-Key gets the same answer and the same count", same=num_same)
        ]
    says = f"{len(doubled)} of {_SAMPLES} retries with the same Idempotency-Key are answered and counted a second time"
    if probing.sender.promises.retries_once:
        return [
            Finding(probe=PROBE, verdict=Verdict.VIOLATION, says=says, figures={"cases": doubled}, samples=_SAMPLES)
        ]
    return [fact(PROBE, f"{says}; nothing else was promised", cases=doubled)]
