"""Grammars that an output has to follow: the engine (llguidance), its limits, and a model's vocabulary for it.

A grammar is text in the engine's Lark dialect, with JSON schemas in it. The router makes grammars from requests, and
decode workers apply them. Both services use the same limits, so decode can apply every grammar that the router accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llguidance

from antefix.tokenizer import Tokenizer

# A third of the engine's own limits: about 10 ms to build a grammar's lexer, and 4 ms for one token.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=60_000,
    step_max_items=20_000,
    max_items_in_row=1_000,
    # One lexer state takes 1 to 2 KB.
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# The engine marks the name of a special token with this byte, which never occurs in UTF-8 text.
_SPECIAL = b"\xff"


@dataclass(frozen=True, slots=True)
class _Words:
    """A vocabulary of tokens in the form that the grammar engine expects."""

    tokenizer: Tokenizer
    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: int | None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar forces, without any choice for the model. At these tokens the model has
        no choice, neither of text nor of tokens.
        """
        return self.tokenizer.encode(text)


class Vocabulary:
    """A model's tokens in the form that the grammar engine needs. Special tokens match no text of a grammar; end tokens
    end the output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the model's number of tokens, which may be larger than the tokenizer's."""
        # The engine's vocabulary may have one token more: see below.
        special = tokenizer.special_ids | tokenizer.eos_ids | frozenset(range(tokenizer.num_tokens, vocab_size))
        tokens = [b"" if token in special else tokenizer.token_bytes(token) for token in range(vocab_size)]
        unsaid = [token for token, text in enumerate(tokens) if not text]
        for token in unsaid:
            tokens[token] = _SPECIAL + f"<|{token}|>".encode()
        # The engine needs an end token to mark where nothing may follow. For a model without one, add a token that the
        # model cannot generate.
        ends = sorted(tokenizer.eos_ids) or [vocab_size]
        if ends == [vocab_size]:
            tokens.append(_SPECIAL + b"<|end|>")
            unsaid.append(vocab_size)
        self.size = len(tokens)
        words = _Words(tokenizer, tokens, unsaid, ends[0])
        self.engine = llguidance.LLTokenizer(words, n_vocab=len(tokens), eos_token=ends)  # type: ignore[arg-type]

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the start of the grammar. The matcher's `is_error` says whether the grammar is usable.

        Building a matcher may take long, so it must not be done on an event loop.
        """
        return llguidance.LLMatcher(self.engine, grammar, log_level=0, limits=LIMITS)


def reason(message: str) -> str:
    """The engine's message about an error in a grammar, without its notes."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300] or "it cannot be followed"
