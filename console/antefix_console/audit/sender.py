"""Sends all requests of an audit, at a bounded rate and within a budget, and checks each answer's token counts.

Checks of single answers need no statistics: a count that is wrong once is wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from antefix.errors import AntefixError, Unavailable
from antefix_console.audit.finding import Finding, Verdict
from antefix_console.audit.promises import Promises
from antefix_console.endpoint.reply import Question, Reply
from antefix_console.load.prompt_text import TokenRate

# Tolerance for tokens that span the joint of two texts, and for estimating tokens from words.
_SLACK_TOKENS = 16
_SLACK_SHARE = 0.05
_RETRIES_MAX = 5
_RETRY_AFTER_MAX_S = 120.0
_TRANSIENT = {0, 408, 425, 429, 500, 502, 503, 504, 529}


class BudgetSpent(AntefixError):
    """The budget that was announced before the audit allows no further request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """requests, tokens: the most that may be used, with input and output tokens counted together. per_s: requests per
    second.
    """

    requests: int
    tokens: int
    per_s: float = 2.0


@dataclass(slots=True)
class Scope:
    """A caller. Prompts of one scope may share a cache; prompts of two scopes may not, unless the endpoint says
    otherwise.

    prompts: all prompts sent in this scope so far, as words.
    """

    name: str
    ask: Callable[[Question], Awaitable[Reply]]
    user: str = ""
    salt: str = ""
    prompts: list[str] = field(default_factory=list)


class Sender:
    """clock, sleep: replaced in tests by simulated time."""

    def __init__(
        self,
        budget: Budget,
        promises: Promises,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.budget = budget
        self.promises = promises
        self.clock = clock
        self.sleep = sleep
        self.rate: TokenRate | None = None
        self.num_requests = 0
        self.num_tokens = 0
        self.violations: dict[str, list[str]] = defaultdict(list)
        self._next_at = 0.0
        # Token count by prompt: the same text must be counted the same each time.
        self._prompt_tokens: dict[int, int] = {}

    async def ask(self, scope: Scope, prompt: str, *, max_tokens: int = 1, logprobs: bool = False) -> Reply:
        """Raises:  BudgetSpent.  Unavailable: no answer after some retries."""
        return await self.send(
            scope,
            Question(prompt=prompt, max_tokens=max_tokens, user=scope.user, salt=scope.salt, logprobs=logprobs),
        )

    async def send(self, scope: Scope, question: Question, *, also_sent_by: Scope | None = None) -> Reply:
        """also_sent_by: hits on this scope's prompts are not reported as a violation here; the caller judges them.

        Raises:  BudgetSpent.  Unavailable: no answer after some retries.
        """
        for _ in range(_RETRIES_MAX):
            if self.num_requests >= self.budget.requests or self.num_tokens >= self.budget.tokens:
                raise BudgetSpent(f"spent: {self.num_requests} requests, {self.num_tokens} tokens")
            now = self.clock()
            await self.sleep(max(0.0, self._next_at - now))
            self._next_at = max(now, self._next_at) + 1 / self.budget.per_s
            self.num_requests += 1
            reply = await scope.ask(question)
            self.num_tokens += reply.usage.prompt_tokens + reply.usage.output_tokens
            if reply.ok or reply.status not in _TRANSIENT:
                break
            await self.sleep(min(max(reply.retry_after_s, 1.0), _RETRY_AFTER_MAX_S))
        if not reply.ok and reply.status in _TRANSIENT:
            raise Unavailable(f"the endpoint did not answer {_RETRIES_MAX} times: {reply.error}")
        if reply.ok:
            known = scope.prompts + (also_sent_by.prompts if also_sent_by else [])
            self._hold_to_rules(known, question, reply)
        scope.prompts.append(question.prompt)
        return reply

    def findings(self) -> list[Finding]:
        """One finding for each rule that answers broke, with the first cases."""
        found = [
            Finding(
                probe="rules",
                verdict=Verdict.VIOLATION,
                says=f"{rule}: {len(cases)} of {self.num_requests} answers",
                figures={"cases": cases[:5]},
                samples=self.num_requests,
            )
            for rule, cases in self.violations.items()
        ]
        if not found:
            says = f"all {self.num_requests} answers keep the rules of counting"
            found.append(Finding(probe="rules", verdict=Verdict.FACT, says=says, samples=self.num_requests))
        return found

    def _hold_to_rules(self, known: list[str], question: Question, reply: Reply) -> None:
        usage, name = reply.usage, reply.request_id or reply.answer_id
        cached, prompt = usage.cached_tokens, usage.prompt_tokens

        def broken(rule: str, case: str) -> None:
            self.violations[rule].append(f"{name}: {case}" if name else case)

        if cached > prompt:
            broken("more hit tokens than the prompt has", f"{cached} of {prompt}")
        if usage.missed_tokens is not None and cached + usage.missed_tokens != prompt:
            broken("hits and misses are not the prompt", f"{cached} + {usage.missed_tokens} is not {prompt}")
        if usage.output_tokens > question.max_tokens:
            broken("more output tokens than were allowed", f"{usage.output_tokens} of {question.max_tokens}")
        before = self._prompt_tokens.setdefault(hash(question.prompt), prompt)
        if before != prompt:
            broken("one prompt, two counts", f"{before} tokens at first, {prompt} later, {cached} of them hits")
        promises = self.promises
        if cached % promises.hit_unit_tokens:
            broken(f"hits are no multiple of {promises.hit_unit_tokens} tokens", f"{cached}")
        if 0 < cached < promises.smallest_hit_tokens:
            broken(f"hits of fewer than {promises.smallest_hit_tokens} tokens", f"{cached}")
        if self.rate is not None and cached > (most := self._shared_tokens_max(known, question.prompt)):
            broken("hits on text that was never sent", f"{cached} tokens, at most {most} of them were sent before")

    def _shared_tokens_max(self, known: list[str], prompt: str) -> int:
        """The largest number of the prompt's tokens that can have been part of a known prompt."""
        assert self.rate is not None
        shared = max((_shared_length(prompt, each) for each in known), default=0)
        num_words = prompt.count(" ", 0, shared) + 1
        tokens = self.rate.fixed_tokens + num_words * self.rate.tokens_per_word
        return int(tokens * (1 + _SLACK_SHARE)) + _SLACK_TOKENS


def _shared_length(one: str, other: str) -> int:
    """The number of characters with which both texts begin, found by halving, because there are many long prompts."""
    shared, differs = 0, min(len(one), len(other)) + 1
    while differs - shared > 1:
        middle = (shared + differs) // 2
        if one[shared:middle] == other[shared:middle]:
            shared = middle
        else:
            differs = middle
    return shared
