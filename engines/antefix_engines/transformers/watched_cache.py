"""A transformers cache that records how it was filled, and so up to which token its KV equals a cold run's to the bit.

A model's KV depends on how its prompt was cut: a forward pass over 300 tokens gives other last bits than passes over
128, 128 and 44 tokens. So a cache is exact as long as each block was restored, or computed by a pass over just that
block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore found. is_exact: the cache equals, to the bit, what the same chunks give without a store.

    num_cached_tokens: tokens restored.  num_stored_tokens: tokens of the prompt's prefix that are stored; more than
    restored if a checkpoint is missing.  why: why the restored part is shorter, or approximate; empty if it is neither.
    """

    num_tokens: int
    num_cached_tokens: int
    num_stored_tokens: int
    is_exact: bool
    kv_format: str
    nbytes: int = 0
    seconds: float = 0.0
    why: str = ""


class WatchedCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache that `generate` accepts like any other. report: of the restore that made the cache.

    num_exact_tokens: a multiple of the block size; tokens that `AntefixCache.save` may store.
    hashes: names of the blocks that Antefix restored or computed; tokens to be saved must begin with these blocks.
    """

    def __init__(self, *, config: Any, block_size: int) -> None:
        super().__init__(config=config)
        self.block_size = block_size
        self.num_exact_tokens = 0
        self.hashes: list[bytes] = []
        self.report: RestoreReport | None = None
        self._last_layer = -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # A pass goes through the layers in order, so a layer that is not a later one begins the next pass.
        if layer_idx <= self._last_layer or self._last_layer < 0:
            self._note_pass(key_states, super().get_seq_length(layer_idx))
        self._last_layer = layer_idx
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._forget_from(self.get_seq_length() // self.block_size)

    def reset(self) -> None:
        super().reset()
        self._forget_from(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._forget_from(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._forget_from(0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._forget_from(0)

    def _note_pass(self, key_states: Tensor, num_before: int) -> None:
        batch, num_new = key_states.shape[0], key_states.shape[-2]
        if batch != 1:
            self._forget_from(0)
        elif num_before == self.num_exact_tokens and num_new == self.block_size:
            self.num_exact_tokens += num_new

    def _forget_from(self, num_blocks: int) -> None:
        self.num_exact_tokens = min(self.num_exact_tokens, num_blocks * self.block_size)
        del self.hashes[num_blocks:]
        self._last_layer = -1
