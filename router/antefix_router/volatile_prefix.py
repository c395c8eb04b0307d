"""Detects that a client's prompts begin with text that changes each time. Volatile beginnings have no effect other than
a warning in the bill.

A prefix cache hits up to the first token that differs. A client that puts a time, an id or a checksum at the head of
its prompts computes the whole prompt again each time. So the first tokens of each client's last prompts are kept. If a
new prompt differs early from a kept one but continues with the same text, its beginning is volatile. The memory is
bounded, both per client (tenant and user) and in all. Checking a prompt takes less than a millisecond.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from antefix.clients import Tokens

# How many tokens are compared. More would not change the result, because only early changes matter.
HEAD_TOKENS: Final = 1024
# Prompts that are equal this far do not count as different: four blocks, more than a format writes before all text.
_BEGINNING_TOKENS: Final = 256
# Less common text than this may be chance.
_LATER_TOKENS_MIN: Final = 128
# Texts are compared by windows of this size, because the changing part may also change its length.
_WINDOW_TOKENS: Final = 16
# Agents alternate between a few kinds of prompts.
_NUM_HEADS: Final = 4
# Each takes 16 KiB at most.
NUM_CLIENTS_MAX: Final = 2048

_FACTORS: Final = np.array([pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in range(_WINDOW_TOKENS)], np.uint64)


@dataclass(frozen=True, slots=True)
class _Head:
    tokens: npt.NDArray[np.uint32]
    is_volatile: bool


class PrefixWatch:
    """The first tokens of the last prompts, by client. The clients that were not seen for the longest time are dropped
    first.
    """

    def __init__(self, num_clients_max: int = NUM_CLIENTS_MAX) -> None:
        self._num_clients_max = num_clients_max
        self._heads: OrderedDict[str, deque[_Head]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heads)

    def note(self, client: str, tokens: Tokens) -> bool:
        """Whether this prompt begins with text that has changed since one of the client's last prompts."""
        head = np.array(tokens[:HEAD_TOKENS], np.uint32)
        heads = self._heads.setdefault(client, deque(maxlen=_NUM_HEADS))
        self._heads.move_to_end(client)
        while len(self._heads) > self._num_clients_max:
            self._heads.popitem(last=False)
        is_volatile = _judge(head, heads)
        heads.append(_Head(head, is_volatile))
        return is_volatile


def _judge(head: npt.NDArray[np.uint32], heads: deque[_Head]) -> bool:
    shared = [(_num_shared(head, older.tokens), older) for older in heads]
    for num, older in shared:
        if num == len(head) == len(older.tokens):
            return older.is_volatile  # the same prompt again: another attempt
    if any(num >= min(_BEGINNING_TOKENS, len(head), len(older.tokens)) for num, older in shared):
        return False
    return any(_says_the_same(head[num:], older.tokens[num:]) for num, older in shared)


def _num_shared(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> int:
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


def _says_the_same(new: npt.NDArray[np.uint32], old: npt.NDArray[np.uint32]) -> bool:
    """Whether at least half of the text after the difference also occurs in the other prompt."""
    if min(len(new), len(old)) < _LATER_TOKENS_MIN:
        return False
    # np.isin would load numpy.ma at its first call, which made the first request after a start wait for 14 ms.
    known, wanted = np.sort(_windows(old)), _windows(new)
    nearest = known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)]
    return bool((nearest == wanted).mean() >= 0.5)


def _windows(tokens: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """A hash of each window of tokens, where the last windows continue at the beginning. A collision would only make a
    wrong warning slightly more likely.
    """
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), _WINDOW_TOKENS)
    return (windows * _FACTORS).sum(axis=1, dtype=np.uint64)  # type: ignore[no-any-return]
