"""A transformers cache as payloads of blocks and checkpoints, and back. This module knows tensors and bytes, never
stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from antefix.block import Family
from antefix_engines.engine_layout import EngineLayout, Part
from antefix_engines.transformers.cache_rows import LayerRows, Slot
from antefix_engines.transformers.kv_encoding import Exact, KvEncoding
from antefix_engines.transformers.watched_cache import WatchedCache

_EXACT: Final = Exact()


class CachePayloads:
    """The layout of one model's cache, and what reads and fills it."""

    def __init__(
        self,
        layers: Sequence[LayerRows],
        encoding: KvEncoding,
        *,
        block_size: int,
        family: Family,
    ) -> None:
        self._layers: Final = tuple(layers)
        self._encoding: Final = encoding
        self._block_slots: Final = [slot for layer in layers for slot in layer.block]
        self._state_slots: Final = [slot for layer in layers for slot in layer.checkpoint]
        self.layout: Final = EngineLayout(
            engine="transformers",
            family=family,
            block_size=block_size,
            block=tuple(self._part(at, slot) for at, layer in enumerate(layers) for slot in layer.block),
            checkpoint=tuple(self._part(at, slot) for at, layer in enumerate(layers) for slot in layer.checkpoint),
            num_checkpoints=max((layer.num_checkpoints for layer in layers), default=0),
        )

    def block(self, cache: WatchedCache, index: int) -> bytearray:
        """Block `index` of a cache."""
        taken = [tensor for rows, layer in self._each(cache) for tensor in rows.take_block(layer, index)]
        return self._encoded(self._block_slots, taken, self.layout.block_bytes)

    def checkpoint(self, cache: WatchedCache, index: int, num_tokens: int) -> bytearray | None:
        """The checkpoint at the end of block `index`; None if a cache at `num_tokens` no longer has all of it."""
        taken: list[Tensor] = []
        for rows, layer in self._each(cache):
            mine = rows.take_checkpoint(layer, index, num_tokens)
            if mine is None:
                return None
            taken += mine
        return self._encoded(self._state_slots, taken, self.layout.checkpoint_bytes)

    def fill(self, cache: WatchedCache, blocks: bytearray, checkpoints: bytearray, num_blocks: int) -> None:
        """Fill an empty cache as if it had seen these blocks, from their payloads and the last checkpoints, in
        order.
        """
        num_states = self.layout.num_checkpoints_at(num_blocks)
        block_rows = iter(self._decoded(blocks, num_blocks, self._block_slots, self.layout.block))
        state_rows = iter(self._decoded(checkpoints, num_states, self._state_slots, self.layout.checkpoint))
        for rows, layer in self._each(cache):
            mine = [next(block_rows) for _ in rows.block]
            states = [next(state_rows) for _ in rows.checkpoint]
            rows.fill(layer, mine, states, num_blocks * self.layout.block_size)

    def bits_of(self, cache: WatchedCache) -> str:
        """A digest of the first block in a cache. The digest's last bits depend on the hardware and software that
        computed it.
        """
        state = hashlib.blake2b(self.block(cache, 0), digest_size=5)
        state.update(self.checkpoint(cache, 0, self.layout.block_size) or b"")
        return state.hexdigest()

    def _each(self, cache: WatchedCache) -> list[tuple[LayerRows, Any]]:
        return list(zip(self._layers, cache.layers, strict=True))

    def _encoding_of(self, slot: Slot) -> KvEncoding:
        return _EXACT if slot.is_state else self._encoding

    def _part(self, layer: int, slot: Slot) -> Part:
        encoding = self._encoding_of(slot)
        dtype = str(slot.dtype).removeprefix("torch.")
        return Part(
            layer=layer,
            group=slot.group,
            num_rows=slot.num_rows,
            record=encoding.record(slot.num_numbers, slot.dtype),
            dtype=dtype if encoding.is_exact else f"{encoding.name} of {dtype}",
        )

    def _encoded(self, slots: Sequence[Slot], tensors: Sequence[Tensor], nbytes: int) -> bytearray:
        payload = bytearray(nbytes)
        if not slots:
            return payload
        whole, offset = torch.frombuffer(payload, dtype=torch.uint8), 0
        for slot, tensor in zip(slots, tensors, strict=True):
            rows = tensor.detach().reshape(slot.num_rows, slot.num_numbers)
            raw = self._encoding_of(slot).encode(rows).reshape(-1)
            whole[offset : offset + raw.numel()].copy_(raw)
            offset += raw.numel()
        return payload

    def _decoded(self, raw: bytearray, count: int, slots: Sequence[Slot], parts: Sequence[Part]) -> list[Tensor]:
        """For each slot the rows of all payloads, one after the other: [count * num_rows, *shape]."""
        if not slots:
            return []
        payloads, offset, found = torch.frombuffer(raw, dtype=torch.uint8).reshape(count, -1), 0, []
        for slot, part in zip(slots, parts, strict=True):
            rows = payloads[:, offset : offset + part.nbytes].reshape(count * part.num_rows, part.record.nbytes)
            numbers = self._encoding_of(slot).decode(rows, slot.num_numbers, slot.dtype)
            found.append(numbers.reshape(-1, *slot.shape).to(slot.device))
            offset += part.nbytes
        return found
