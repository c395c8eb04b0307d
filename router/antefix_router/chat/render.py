"""Turns a format's pieces into tokens. Special tokens come only from the format; other text is plain; remembered
answers keep their generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antefix.generation_request import Breakpoint
from antefix.tokenizer import Tokenizer
from antefix_router.chat.answer_memory import AnswerMemory, aside_name, prefix_state
from antefix_router.chat.messages import Answer, Aside, Piece, Plain, Special, TextBreakpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt in tokens. breakpoints: the client's cache breakpoints, in ascending order.

    num_remembered: answers for which the generated tokens were used.  num_restored: those of them whose reasoning the
    client did not send back.  aside: this request's changing text, if it has one: the name to remember it by, and its
    tokens.
    """

    tokens: list[int]
    breakpoints: tuple[Breakpoint, ...]
    num_remembered: int
    num_restored: int = 0
    aside: tuple[bytes, list[int]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpan:
    """The tokens [start, end) into which a piece of text was encoded."""

    start: int
    end: int
    text: str


def render_tokens(pieces: Sequence[Piece], tokenizer: Tokenizer, memory: AnswerMemory, *, tenant: str) -> Rendered:
    """The prompt's tokens.  tenant: the cache tenant, whose answers may be remembered."""
    tokens: list[int] = []
    breakpoints: list[Breakpoint] = []
    # One hash over all tokens so far is updated along the way, so that many answers cost no more than one.
    prefix, num_hashed, num_remembered = prefix_state(tenant, ()), 0, 0
    num_restored = 0
    aside: tuple[bytes, list[int]] | None = None
    for piece in pieces:
        if isinstance(piece, TextBreakpoint):
            breakpoints.append(Breakpoint(len(tokens), piece.ttl_s))
        elif isinstance(piece, Aside):
            prefix.update(np.asarray(tokens[num_hashed:], "<u4").tobytes())
            num_hashed = len(tokens)
            name = aside_name(prefix)
            if piece.pieces:
                aside = name, _encode(piece.pieces, tokenizer)[0]
            tokens += aside[1] if aside is not None else memory.aside(name) or []
        elif isinstance(piece, Answer):
            prefix.update(np.asarray(tokens[num_hashed:], "<u4").tobytes())
            num_hashed = len(tokens)
            known = memory.get(prefix, piece.message)
            num_remembered += known is not None
            num_restored += known is not None and known.is_restored
            if known is None or any(part.breakpoints for part in piece.pieces):
                written, inside = _encode(piece.pieces, tokenizer)
                size = len(written) if known is None else len(known.tokens)
                # Restored reasoning precedes everything that the client marked.
                moved = size - len(written) if known is not None and known.is_restored else 0
                breakpoints += [Breakpoint(num_hashed + max(0, min(at + moved, size)), ttl_s) for at, ttl_s in inside]
            tokens += known.tokens if known is not None else written
        else:
            written, inside = _encode((piece,), tokenizer)
            breakpoints += [Breakpoint(len(tokens) + at, ttl_s) for at, ttl_s in inside]
            tokens += written
    return Rendered(
        tokens=tokens,
        breakpoints=tuple(sorted(breakpoints)),
        num_remembered=num_remembered,
        num_restored=num_restored,
        aside=aside,
    )


def num_characters(pieces: Sequence[Piece]) -> int:
    """The length of the text that `render_tokens` has to encode. Text before a breakpoint that lies inside a piece is
    encoded a second time.
    """
    total = 0
    for piece in pieces:
        if not isinstance(piece, TextBreakpoint):
            for part in piece.pieces if isinstance(piece, (Answer, Aside)) else (piece,):
                total += len(part.text) + sum(each.offset or 0 for each in part.breakpoints)
    return total


def num_plain_characters(pieces: Sequence[Piece]) -> int:
    """The length of the text from outside, which holds no special tokens. Answers do not count in this length, because
    some of them are remembered as tokens.
    """
    return sum(len(piece.text) for piece in pieces if isinstance(piece, Plain))


def _encode(pieces: Sequence[Special | Plain], tokenizer: Tokenizer) -> tuple[list[int], list[Breakpoint]]:
    """The tokens of the text, and the positions of the breakpoints in them. The text is never split at a breakpoint:
    clients move breakpoints from turn to turn, and a split would change the tokens around it and so every later block.
    """
    tokens: list[int] = []
    breakpoints: list[Breakpoint] = []
    for piece in pieces:
        encode = tokenizer.encode if isinstance(piece, Special) else tokenizer.encode_plain
        for each in piece.breakpoints:
            num_before = len(tokens) + len(encode(piece.text[: each.offset]))
            breakpoints.append(Breakpoint(num_before, each.ttl_s))
        tokens += encode(piece.text)
    return tokens, breakpoints
