"""The parts that all probes use: callers, new prompts, and sample sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from antefix_console.audit.sender import Scope, Sender
from antefix_console.endpoint.reply import Question, Reply
from antefix_console.load.prompt_text import words


@dataclass(slots=True, kw_only=True)
class Probing:
    """scope: the caller whose cache is examined.  other_key: a caller with another API key, if there is one.

    prompt_words: words of a usual prompt.  samples: comparisons per statistical test.  seed: for the text of all
    prompts.
    """

    sender: Sender
    scope: Scope
    other_key: Scope | None = None
    prompt_words: int
    samples: int
    seed: str
    _fresh: Iterator[int] = field(default_factory=itertools.count)

    def fresh_prompt(self, num_words: int | None = None) -> str:
        """Text that nobody has sent before."""
        return words(f"{self.seed} {next(self._fresh)}", num_words or self.prompt_words)

    async def ask(self, prompt: str, *, scope: Scope | None = None, max_tokens: int = 1) -> Reply:
        return await self.sender.ask(scope or self.scope, prompt, max_tokens=max_tokens)

    async def ask_as(self, scope: Scope, prompt: str, *, after: Scope) -> Reply:
        """Send, as one caller, a prompt that the caller `after` has sent."""
        question = Question(prompt=prompt, user=scope.user, salt=scope.salt)
        return await self.sender.send(scope, question, also_sent_by=after)

    def tokens_of(self, num_words: float) -> float:
        """About how many tokens `num_words` words take, without the chat format around them."""
        assert self.sender.rate is not None
        return num_words * self.sender.rate.tokens_per_word

    def tokens_before(self, num_words: float) -> float:
        """About how many tokens two prompts share whose first `num_words` words are equal, chat format included."""
        assert self.sender.rate is not None
        return self.tokens_of(num_words) + self.sender.rate.fixed_tokens
