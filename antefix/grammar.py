"""Grammars that an output has to follow: the engine (llguidance), its limits, and a model's vocabulary for it.

A grammar is text in the engine's Lark dialect, with JSON schemas in it. The router, which makes one from a request, and
decode, which follows it, use the same limits, so that what the first lets through the second can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llguidance

from antefix.tokenizer import Tokenizer

# A third of the engine's own limits: some 10 ms of work for the lexer of a grammar, and 4 ms for any one token.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=60_000,
    step_max_items=20_000,
    max_items_in_row=1_000,
    # 1 to 2 KB each.
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# The engine marks a special token's name with this byte, which no UTF-8 text has.
_SPECIAL = b"\xff"


@dataclass(frozen=True, slots=True)
class _Words:
    """A vocabulary as the engine asks for it."""

    tokenizer: Tokenizer
    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: int | None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str) -> list[int]:
        """How text is spelt where the grammar leaves only one text: then the model has no choice of tokens either."""
        return self.tokenizer.encode(text)


class Vocabulary:
    """A model's tokens. Special tokens are no text to a grammar; the end tokens end what it describes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the model's, which may be more than the tokenizer names."""
        # For the engine it may be one more: see below.
        special = tokenizer.special_ids | tokenizer.eos_ids | frozenset(range(tokenizer.num_tokens, vocab_size))
        tokens = [b"" if token in special else tokenizer.token_bytes(token) for token in range(vocab_size)]
        unsaid = [token for token, text in enumerate(tokens) if not text]
        for token in unsaid:
            tokens[token] = _SPECIAL + f"<|{token}|>".encode()
        # Without an end token there is still an end, where nothing may follow: a token that nobody can say means it.
        ends = sorted(tokenizer.eos_ids) or [vocab_size]
        if ends == [vocab_size]:
            tokens.append(_SPECIAL + b"<|end|>")
            unsaid.append(vocab_size)
        self.size = len(tokens)
        words = _Words(tokenizer, tokens, unsaid, ends[0])
        self.engine = llguidance.LLTokenizer(words, n_vocab=len(tokens), eos_token=ends)  # type: ignore[arg-type]

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """One that has read nothing; whether it is usable it says itself (`is_error`). May take long: see the module
        of who calls."""
        return llguidance.LLMatcher(self.engine, grammar, log_level=0, limits=LIMITS)


def reason(message: str) -> str:
    """What the engine says of a grammar's fault, without its notes."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300] or "it cannot be followed"
