"""Marks of a prompt: a few of its block hashes, kept in its usage record to compare prompts later without their text.

A block's hash depends on all tokens up to the block's end, so equal hashes mean equal prefixes. The marks are the
hashes after 1, 2, 3, 4, 6, 8, 12, ... blocks and after the last whole block, cut to 6 bytes. So the length of two
prompts' common prefix is known to a factor of 1.5.

    "<number of whole blocks>:<hash><hash>..."     each hash has 12 hex digits, in order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from antefix.errors import InvalidRequest

_HEX_DIGITS: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """How many leading blocks two prompts have in common: at least `blocks_min`, and at most `blocks_max`."""

    blocks_min: int
    blocks_max: int


def places(num_blocks: int) -> list[int]:
    """The numbers of blocks after which a prompt has a mark."""
    found, step = [], 1
    while step <= num_blocks:
        found += [step, step * 3 // 2] if step > 1 else [1]
        step *= 2
    return sorted({place for place in found if place <= num_blocks} | ({num_blocks} if num_blocks > 0 else set()))


def marks_of(hashes: Sequence[bytes]) -> str:
    """The marks of a prompt with these block hashes; empty for a prompt that is shorter than a block."""
    if not hashes:
        return ""
    return f"{len(hashes)}:" + "".join(_short(hashes[place - 1]) for place in places(len(hashes)))


def mark_at(marks: str, num_blocks: int) -> str:
    """The mark after `num_blocks` blocks: the first 6 bytes of the hash there, in hex. Returns an empty text if there
    is no such mark.
    """
    try:
        return _read(marks).get(num_blocks, "")
    except InvalidRequest:
        return ""


def block_size_of(marks: str, num_tokens: int) -> int:
    """The block size that fits a prompt of `num_tokens` tokens with these marks; 0: it has no marks, or no size fits.

    If several sizes fit, as with few blocks, a power of two is preferred as the likeliest.
    """
    num_blocks = _end(_read(marks))
    if not num_blocks:
        return 0
    fitting = range(num_tokens // (num_blocks + 1) + 1, num_tokens // num_blocks + 1)
    return next((size for size in fitting if size & (size - 1) == 0), fitting[0] if fitting else 0)


def parting(one: str, other: str) -> Parting:
    """How many leading blocks two marked prompts share.  Raises:  InvalidRequest: a text cannot be read as marks."""
    first, second = _read(one), _read(other)
    both = sorted(set(first) & set(second))
    return _parting([place for place in both if first[place] == second[place]], both, min(_end(first), _end(second)))


def parting_of_chain(hashes: Sequence[bytes], marks: str) -> Parting:
    """As `parting`, for one prompt whose hashes are all known and another that is known only by its marks."""
    known = _read(marks)
    both = [place for place in known if place <= len(hashes)]
    alike = [place for place in both if known[place] == _short(hashes[place - 1])]
    return _parting(alike, both, min(_end(known), len(hashes)))


def _parting(alike: list[int], both: list[int], end: int) -> Parting:
    low = max(alike, default=0)
    # The first mark that differs gives the upper bound.
    high = min((place - 1 for place in both if place > low), default=end)
    return Parting(blocks_min=low, blocks_max=high)


def _read(marks: str) -> dict[int, str]:
    if not marks:
        return {}
    number, _, digits = marks.partition(":")
    try:
        at = places(int(number))
        bytes.fromhex(digits)
    except ValueError as err:
        raise InvalidRequest(f"the text {marks[:40]!r} cannot be read as marks of a prompt") from err
    if len(digits) != _HEX_DIGITS * len(at):
        raise InvalidRequest(f"the text {marks[:40]!r} cannot be read as marks of a prompt")
    return {place: digits[_HEX_DIGITS * i : _HEX_DIGITS * (i + 1)] for i, place in enumerate(at)}


def _end(marks: dict[int, str]) -> int:
    return max(marks, default=0)


def _short(block_hash: bytes) -> str:
    return block_hash.hex()[:_HEX_DIGITS]
