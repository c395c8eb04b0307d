"""Turns of a resent conversation, and how far each must hit what came before."""

import dataclasses
import itertools

from antefix.window.auto import CUE_TOKENS

BLOCK = 64


@dataclasses.dataclass
class Turn:
    """One turn: numbers of tokens of its prompt, its answer and its hit."""

    prompt: int
    answer: int
    hit: int


def check_hits(turns, *what):
    for before, turn in itertools.pairwise(turns):
        # The last token of a cut-off answer was chosen but not run, so the next turn computes its KV.
        kept = before.prompt + before.answer
        full = {(kept - 1) // BLOCK * BLOCK, kept // BLOCK * BLOCK}
        # A prompt that ends at a boundary, or a few tokens after it, has its checkpoint one block earlier: the same
        # prompt, or one with another cue at its end, can also resume there.
        full |= {end - BLOCK for end in full if 0 <= before.prompt - end < CUE_TOKENS}
        assert turn.hit in full, (*what, turns)
