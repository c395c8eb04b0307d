"""Turns of a resent conversation, and how far each must hit what came before."""

import dataclasses
import itertools

BLOCK = 64


@dataclasses.dataclass
class Turn:
    """In tokens."""

    prompt: int
    answer: int
    hit: int


def check_hits(turns, *what):
    for before, turn in itertools.pairwise(turns):
        # The last token of an answer that was cut off is chosen, not run: its KV is the next turn's to compute.
        kept = before.prompt + before.answer
        full = {(kept - 1) // BLOCK * BLOCK, kept // BLOCK * BLOCK}
        # A prompt that ends at a boundary has its checkpoint one block earlier, where it can be resumed itself.
        full |= {before.prompt - BLOCK} & {end - BLOCK for end in full if end == before.prompt}
        assert turn.hit in full, (*what, turns)
