"""Makes text for the requests of a trace. Equal names give equal text, so prompts share exactly the prefixes in the
trace.

A trace has no text, only names of prefixes. Each unit of a prompt becomes words that are drawn by the unit's name. The
number of words per unit follows from a measurement at the endpoint, because its tokenizer is not known.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from antefix.errors import Unavailable
from antefix_console.endpoint.reply import Question, Reply
from antefix_simulate.trace import TraceRequest

# Words of four letters of alternating kind: most tokenizers take such a word with its space as one or two tokens.
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
WORDS = tuple(a + b + c + d for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS for d in _VOWELS)
# Words in the two requests that measure tokens per word. Their difference cancels the chat format around a prompt.
_SHORT_WORDS, _LONG_WORDS = 64, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRate:
    """tokens_per_word: tokens per word of `WORDS`, with its space.  fixed_tokens: tokens of a prompt without words."""

    tokens_per_word: float
    fixed_tokens: float

    def num_words(self, num_tokens: float) -> int:
        return max(1, round(num_tokens / self.tokens_per_word))


async def measure_token_rate(ask: Callable[[Question], Awaitable[Reply]], seed: int) -> TokenRate:
    """Measure the number of tokens per word with two requests of one output token each.

    Raises:  Unavailable: one of the requests failed.
    """
    tokens = []
    for num_words in (_SHORT_WORDS, _LONG_WORDS):
        reply = await ask(Question(prompt=words(f"measure {seed} {num_words}", num_words)))
        if not reply.ok:
            raise Unavailable(f"the endpoint did not answer the first request: {reply.error}")
        tokens.append(reply.usage.prompt_tokens)
    per_word = (tokens[1] - tokens[0]) / (_LONG_WORDS - _SHORT_WORDS)
    if per_word <= 0:
        raise Unavailable(
            f"the endpoint counts {tokens[1]} tokens for {_LONG_WORDS} words, but {tokens[0]} for fewer words"
        )
    return TokenRate(tokens_per_word=per_word, fixed_tokens=tokens[0] - per_word * _SHORT_WORDS)


def words(seed: str, num_words: int) -> str:
    """The same words for the same seed, each followed by a space."""
    return "".join(f"{word} " for word in random.Random(seed).choices(WORDS, k=num_words))


def prompt_text(
    request: TraceRequest, *, number: int, unit_tokens: int, scale: float, rate: TokenRate, salt: str
) -> str:
    """number: the request's number in its trace; text after its last complete unit is unique to the request.

    scale: factor on all lengths. salt: another salt gives other text of the same shape, which hits nothing of the
    first.
    """
    unit_words = rate.num_words(unit_tokens * scale)
    parts = [words(f"{salt} unit {name}", unit_words) for name in request.names.tolist()]
    rest = request.num_tokens - len(request.names) * unit_tokens
    if rest > 0:
        parts.append(words(f"{salt} rest {number}", rate.num_words(rest * scale)))
    return "".join(parts)
