"""Finds where two prompts begin to differ. The answer is exact for two given prompts; for a usage record, it is known
to a factor of 1.5 in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from antefix.prompt_marks import Parting
from antefix_console.explain.prompt_source import SourcedPrompt, Spot


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """tokens_alike: number of equal tokens at the beginning.  first, second: the places of the first different tokens;
    None if a prompt ends there.
    """

    first_name: str
    second_name: str
    block_size: int
    tokens_alike: int
    num_tokens: tuple[int, int]
    first: Spot | None
    second: Spot | None

    @property
    def blocks_alike(self) -> int:
        """The number of blocks that one of two prompts can hit of the other prompt's blocks."""
        return self.tokens_alike // self.block_size

    def as_dict(self) -> dict[str, Any]:
        parts = self.first is not None or self.second is not None
        return {**asdict(self), "blocks_alike": self.blocks_alike, "parts": parts}


def compare(first: SourcedPrompt, second: SourcedPrompt, block_size: int) -> Comparison:
    """Compare two prompts token by token."""
    one, other = np.asarray(first.tokens), np.asarray(second.tokens)
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    alike = int(differs[0]) if len(differs) else size
    return Comparison(
        first_name=first.name,
        second_name=second.name,
        block_size=block_size,
        tokens_alike=alike,
        num_tokens=(len(one), len(other)),
        first=first.spot(alike),
        second=second.spot(alike),
    )


def comparison_lines(found: Comparison) -> Iterator[str]:
    one, other = found.num_tokens
    if found.first is None and found.second is None:
        yield f"{found.first_name} and {found.second_name} are the same prompt of {one} tokens."
        return
    alike, size = found.tokens_alike, found.block_size
    names = f"{found.first_name} ({one} tokens) and {found.second_name} ({other} tokens)"
    yield f"{names} begin with the same {alike} tokens:"
    yield f"{alike // size} whole blocks of {size} can be hit. They part at token {alike}, in block {alike // size}:"
    for name, spot in ((found.first_name, found.first), (found.second_name, found.second)):
        yield from _spot_lines(name, spot)


def _spot_lines(name: str, spot: Spot | None) -> Iterator[str]:
    if spot is None:
        yield f"  {name}: it ends here"
        return
    yield f"  {name}: {_where(spot)}"
    yield f"    {spot.shown}"


def _where(spot: Spot) -> str:
    return f"{spot.path}, line {spot.line}" if spot.path else "what the chat format writes itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoughComparison:
    """A comparison by the hashes in a usage record. spots: places in the given prompt between which the prompts begin
    to differ.
    """

    first_name: str
    second_name: str
    block_size: int
    parting: Parting
    spots: Sequence[Spot] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rough_lines(found: RoughComparison) -> Iterator[str]:
    low, high, size = found.parting.blocks_min, found.parting.blocks_max, found.block_size
    names = f"{found.first_name} and {found.second_name}"
    if low == high:
        yield f"{names} begin with the same {low} blocks of {size} tokens."
        yield f"They part in the next (from token {low * size} on), or one of them ends there."
    else:
        yield f"{names} begin with the same {low} blocks of {size} tokens at least, and {high} at most."
        yield f"They part between token {low * size} and token {(high + 1) * size - 1}."
    for spot in found.spots:
        yield f"  token {spot.token}: {_where(spot)}"
        yield f"    {spot.shown}"
