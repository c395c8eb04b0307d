"""Pieces to tokens: special tokens where the format wrote them, plain text elsewhere, answers as they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antefix.tokenizer import Tokenizer
from antefix_router.chat.answer_memory import AnswerMemory, answer_name, prefix_state
from antefix_router.chat.messages import Answer, Breakpoint, Piece, Plain, Special


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt. breakpoints: (number of tokens before it, lifetime in seconds), ascending."""

    tokens: list[int]
    breakpoints: tuple[tuple[int, float], ...]
    num_remembered: int


def render_tokens(pieces: Sequence[Piece], tokenizer: Tokenizer, memory: AnswerMemory, *, tenant: str) -> Rendered:
    """The prompt's tokens. tenant: the cache tenant, whose answers may be remembered."""
    tokens: list[int] = []
    breakpoints: list[tuple[int, float]] = []
    # The hash over all tokens so far is carried along, so that many answers cost no more than one.
    prefix, num_hashed, num_remembered = prefix_state(tenant, ()), 0, 0
    for piece in pieces:
        if isinstance(piece, Breakpoint):
            breakpoints.append((len(tokens), piece.ttl_s))
        elif isinstance(piece, Answer):
            prefix.update(np.asarray(tokens[num_hashed:], "<u4").tobytes())
            num_hashed = len(tokens)
            known = memory.get(answer_name(prefix, piece.message))
            num_remembered += known is not None
            for part in piece.pieces:
                breakpoints += _breaks(part, tokens, tokenizer)
            tokens += known if known is not None else _encode(piece.pieces, tokenizer)
        else:
            breakpoints += _breaks(piece, tokens, tokenizer)
            tokens += _encode((piece,), tokenizer)
    return Rendered(tokens=tokens, breakpoints=tuple(sorted(breakpoints)), num_remembered=num_remembered)


def num_characters(pieces: Sequence[Piece]) -> int:
    """How much text `render_tokens` has to encode: a breakpoint inside a text has what is before it encoded again."""
    total = 0
    for piece in pieces:
        if not isinstance(piece, Breakpoint):
            for part in piece.pieces if isinstance(piece, Answer) else (piece,):
                total += len(part.text) + (sum(end for end, _ in part.breaks) if isinstance(part, Plain) else 0)
    return total


def _breaks(piece: Special | Plain, before: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, float]]:
    """Where breakpoints lie in tokens. The text is never cut there: clients move their breakpoints from turn to turn,
    and a cut would change the tokens around it, and with them every block from there on."""
    if not isinstance(piece, Plain):
        return []
    return [(len(before) + len(tokenizer.encode_plain(piece.text[:end])), ttl_s) for end, ttl_s in piece.breaks]


def _encode(pieces: Sequence[Special | Plain], tokenizer: Tokenizer) -> list[int]:
    tokens: list[int] = []
    for piece in pieces:
        tokens += tokenizer.encode(piece.text) if isinstance(piece, Special) else tokenizer.encode_plain(piece.text)
    return tokens
