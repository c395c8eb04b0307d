"""The rule that makes compact V4 windows right: a hit ends where a block ends, and the prompt continues behind it.

vLLM's offloading scheduler takes one token off a hit that covers the whole prompt, to have something to compute. Of a
prompt of exactly 1,024 tokens it would load 1,023, and compute token 1,023 from the state of open groups. Compact
windows lack that state (most of V4-Flash's 15 MB), and rows that were restored stay in vLLM's host memory, where no
tier is asked again. So the rule stands before vLLM's manager: such a prompt hits at the block before, and rows that are
in no block's tail hit nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from antefix_engines.vllm.shape import split_key
from antefix_engines.vllm.v4_pages import V4Pages

# vLLM's `ReqContext` keeps the ends of all keys here, and shows them one by one only.
POSITIONS: Final = "_offload_key_positions"


@dataclass(frozen=True, slots=True)
class _PromptEnd:
    """The prompt has at least so many tokens."""

    num_tokens: int


class AlignedLookup:
    """Stands for `OffloadingManager.lookup`."""

    def __init__(self, lookup: Callable[..., Any], pages: V4Pages, miss: Any) -> None:
        self._lookup: Final = lookup
        self._pages: Final = pages
        self._miss: Final = miss

    def __call__(self, key: bytes, req_context: Any, **others: Any) -> Any:
        if self._is_allowed(key, req_context):
            return self._lookup(key, req_context, **others)
        return self._miss

    def _is_allowed(self, key: bytes, req_context: Any) -> bool:
        position = req_context.get_offload_key_position(key)
        if position is None:
            return False
        group = split_key(key)[1]
        if group != self._pages.blocks.id:
            return self._pages.is_in_window(group, position)
        return bool(position < _prompt_end(req_context))


def _prompt_end(req_context: Any) -> int:
    """A lower bound of the prompt's length: the last row of the finest group (4 tokens) that it fills."""
    known = req_context.get_state(_PromptEnd)
    if known is None:
        positions: Mapping[bytes, int] = getattr(req_context, POSITIONS)
        known = _PromptEnd(max(positions.values(), default=0))
        req_context.set_state(known)
    return int(known.num_tokens)
