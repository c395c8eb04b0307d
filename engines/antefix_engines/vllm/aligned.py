"""The rule that makes compact V4 windows correct: a hit ends at the end of a block, and the prompt continues after it.

vLLM's offloading scheduler shortens a hit that covers the whole prompt by one token, so that one token is computed. For
a prompt of exactly 1,024 tokens it would load 1,023 tokens, and compute the last one from the state of unfinished
groups. Compact windows lack that state (most of V4-Flash's 15 MB). Rows that were restored also stay in vLLM's host
memory, which then answers without asking a tier. So the rule is applied before vLLM's manager: such a prompt hits up to
the block before, and rows that are in no block's tail are never hit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from antefix_engines.vllm.shape import split_key
from antefix_engines.vllm.v4_pages import V4Pages

# vLLM's `ReqContext` keeps the end positions of all keys under this name, and shows them one by one only.
POSITIONS: Final = "_offload_key_positions"


@dataclass(frozen=True, slots=True)
class _PromptEnd:
    """Records that the prompt has at least `num_tokens` tokens."""

    num_tokens: int


class AlignedLookup:
    """Replaces `OffloadingManager.lookup`."""

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
    """A lower bound of the prompt's length: the end of the last row that it fills in the finest group (4 tokens)."""
    known = req_context.get_state(_PromptEnd)
    if known is None:
        positions: Mapping[bytes, int] = getattr(req_context, POSITIONS)
        known = _PromptEnd(max(positions.values(), default=0))
        req_context.set_state(known)
    return int(known.num_tokens)
