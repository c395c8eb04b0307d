"""What each kind of layer of a transformers cache keeps, as rows of blocks and checkpoints. Knows no stores.

    full attention      keys and values of each token                            block
    sliding window      keys and values of the last tokens                       checkpoint
    DSA (V3.2)          keys, values, indexer keys of each token                 block
    V4 HCA, CSA         compressed entries, indexer keys                         block
                        window keys; CSA: overlap rows of its last group         checkpoint
    shared with another layer                                                    nothing

Other kinds (linear attention, states of convolutions) are refused by name: they are not rows of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import cache_utils

from antefix.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Rows of one group of one layer in a block or checkpoint. shape: of a row. is_state: not KV; always stored
    exactly.

    device: of the layer; a large model's layers may be on several GPUs.
    """

    group: str
    num_rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_state: bool = False

    @property
    def num_numbers(self) -> int:
        return int(torch.Size(self.shape).numel())


class LayerRows(ABC):
    """Reads and fills one layer of a KV cache that has one sequence. `block` and `checkpoint` always list the same
    slots.

    num_checkpoints: how many consecutive checkpoints hold what this layer needs at a boundary.
    """

    block: tuple[Slot, ...] = ()
    checkpoint: tuple[Slot, ...] = ()
    num_checkpoints = 0

    @abstractmethod
    def take_block(self, layer: Any, index: int) -> list[Tensor]:
        """The rows of block `index`, [num_rows, *shape] for each slot of `block`."""

    def take_checkpoint(self, layer: Any, index: int, num_tokens: int) -> list[Tensor] | None:
        """The rows of the checkpoint at the end of block `index`; None if the layer, at `num_tokens`, no longer has all
        of them.
        """
        return []

    @abstractmethod
    def fill(self, layer: Any, blocks: Sequence[Tensor], checkpoints: Sequence[Tensor], num_tokens: int) -> None:
        """Fill an empty layer as if it had seen `num_tokens`, from the rows of all blocks and of the last
        checkpoints.
        """


class FullRows(LayerRows):
    """Keys and values of all tokens."""

    def __init__(self, layer: Any, block_size: int) -> None:
        self._block_size: Final = block_size
        self.block = tuple(_kv_slot(name, getattr(layer, name), block_size) for name in ("keys", "values"))

    def take_block(self, layer: Any, index: int) -> list[Tensor]:
        start = index * self._block_size
        return [_tokens(tensor[:, :, start : start + self._block_size]) for tensor in (layer.keys, layer.values)]

    def fill(self, layer: Any, blocks: Sequence[Tensor], checkpoints: Sequence[Tensor], num_tokens: int) -> None:
        keys, values = (_heads(rows) for rows in blocks[:2])
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


class IndexedRows(FullRows):
    """Keys and values of all tokens, and the indexer's keys."""

    def __init__(self, layer: Any, block_size: int) -> None:
        super().__init__(layer, block_size)
        if layer.indexer_position_ids is not None:
            raise InvalidRequest("AntefixCache cannot keep indexer keys that have positions of their own")
        self._has_keys = layer.indexer_keys is not None
        if self._has_keys:
            shape = tuple(layer.indexer_keys.shape[2:])
            dtype, device = layer.indexer_keys.dtype, layer.indexer_keys.device
            keys = Slot(group="indexer_keys", num_rows=block_size, shape=shape, dtype=dtype, device=device)
            self.block = (*self.block, keys)

    def take_block(self, layer: Any, index: int) -> list[Tensor]:
        rows = super().take_block(layer, index)
        start = index * self._block_size
        return [*rows, layer.indexer_keys[0, start : start + self._block_size]] if self._has_keys else rows

    def fill(self, layer: Any, blocks: Sequence[Tensor], checkpoints: Sequence[Tensor], num_tokens: int) -> None:
        super().fill(layer, blocks, checkpoints, num_tokens)
        if self._has_keys:
            layer.lazy_initialization_indexer(blocks[2][None])
            layer.indexer_keys = blocks[2][None]


class WindowRows(LayerRows):
    """Keys and values of the last `sliding_window - 1` tokens; names: of the tensors that differ."""

    def __init__(self, layer: Any, block_size: int, names: tuple[str, ...] = ("keys", "values")) -> None:
        self._block_size: Final = block_size
        self._names: Final = names
        # A query sees `sliding_window - 1` tokens before its own. For a window of one, only the number of tokens is
        # needed.
        self._reach: Final = layer.sliding_window - 1
        num_rows = min(block_size, self._reach)
        if num_rows:
            self.checkpoint = tuple(_kv_slot(f"window_{name}", getattr(layer, name), num_rows) for name in names)
            self.num_checkpoints = -(-self._reach // block_size)
        self._empty = [getattr(layer, name)[:, :, :0] for name in names]

    def take_block(self, layer: Any, index: int) -> list[Tensor]:
        return []

    def take_checkpoint(self, layer: Any, index: int, num_tokens: int) -> list[Tensor] | None:
        if not self.checkpoint:
            return []
        end = (index + 1) * self._block_size
        start = end - self.checkpoint[0].num_rows
        first = num_tokens - layer.keys.shape[-2]
        if not first <= start or end > num_tokens:
            return None
        return [_tokens(getattr(layer, name)[:, :, start - first : end - first]) for name in self._names]

    def fill(self, layer: Any, blocks: Sequence[Tensor], checkpoints: Sequence[Tensor], num_tokens: int) -> None:
        kept = [_heads(rows)[:, :, -self._reach :] for rows in checkpoints[: len(self._names)]] or self._empty
        keys, values = kept[0].contiguous(), kept[-1].contiguous()
        layer.lazy_initialization(keys, values)
        layer.keys = keys
        layer.values = values if len(self._names) > 1 else keys
        layer.cumulative_length = num_tokens


class CompressedRows(WindowRows):
    """V4's HCA and CSA: a window whose values are its keys, compressed entries by name, and CSA's overlap rows."""

    _STATES: Final = ("overlap_kv", "overlap_gate")

    def __init__(self, layer: Any, block_size: int) -> None:
        super().__init__(layer, block_size, ("keys",))
        if block_size % layer.compress_rate:
            raise InvalidRequest(f"block_size must be a multiple of {layer.compress_rate}, is {block_size}")
        self._series: Final = tuple(layer.compressed_kv)
        self._num_entries: Final = block_size // layer.compress_rate
        self.block = tuple(
            Slot(
                group=f"{name}_entries",
                num_rows=self._num_entries,
                shape=tuple(layer.compressed_kv[name].shape[2:]),
                dtype=layer.compressed_kv[name].dtype,
                device=layer.compressed_kv[name].device,
            )
            for name in self._series
        )
        self._states: Final = [
            (state, name) for name in self._series for state in self._STATES if hasattr(layer, state)
        ]
        self._num_window = len(self.checkpoint)
        self._gates: Final = {name: (layer.buffer_kv[name], layer.buffer_gate[name]) for name in self._series}
        states = [
            Slot(
                group=f"{name}_{state}",
                num_rows=getattr(layer, state)[name].shape[1],
                shape=tuple(getattr(layer, state)[name].shape[2:]),
                dtype=getattr(layer, state)[name].dtype,
                device=getattr(layer, state)[name].device,
                is_state=True,
            )
            for state, name in self._states
        ]
        self.checkpoint = (*self.checkpoint, *states)
        self.num_checkpoints = max(self.num_checkpoints, int(bool(states)))

    def take_block(self, layer: Any, index: int) -> list[Tensor]:
        start = index * self._num_entries
        return [layer.compressed_kv[name][0, start : start + self._num_entries] for name in self._series]

    def take_checkpoint(self, layer: Any, index: int, num_tokens: int) -> list[Tensor] | None:
        if self._states and (index + 1) * self._block_size != num_tokens:
            return None
        window = super().take_checkpoint(layer, index, num_tokens) if self._num_window else []
        if window is None:
            return None
        return [*window, *(getattr(layer, state)[name][0] for state, name in self._states)]

    def fill(self, layer: Any, blocks: Sequence[Tensor], checkpoints: Sequence[Tensor], num_tokens: int) -> None:
        super().fill(layer, blocks, checkpoints[: self._num_window], num_tokens)
        for name, rows in zip(self._series, blocks, strict=True):
            layer.compressed_kv[name] = rows[None]
            layer.entry_count[name] = num_tokens // layer.compress_rate
            # At a block boundary the unfinished group is empty; its tensors keep the dtypes and widths of the
            # projections.
            open_kv, open_gate = self._gates[name]
            layer.buffer_kv[name], layer.buffer_gate[name] = open_kv[:, :0], open_gate[:, :0]
        for (state, name), slot, rows in zip(
            self._states, self.checkpoint[self._num_window :], checkpoints[self._num_window :], strict=True
        ):
            # Each checkpoint has overlap rows; those of the last one are used.
            getattr(layer, state)[name] = rows[-slot.num_rows :][None].contiguous()


class NoRows(LayerRows):
    """A layer that uses another one's KV."""

    def take_block(self, layer: Any, index: int) -> list[Tensor]:
        return []

    def fill(self, layer: Any, blocks: Sequence[Tensor], checkpoints: Sequence[Tensor], num_tokens: int) -> None:
        pass


# By name, not by class, because V4's classes exist only after its module was imported.
_KINDS: Final[dict[str, Callable[[Any, int], LayerRows]]] = {
    "DynamicLayer": FullRows,
    "DynamicSlidingWindowLayer": WindowRows,
    "V4 window": lambda layer, block_size: WindowRows(layer, block_size, ("keys",)),
    "DynamicIndexedLayer": IndexedRows,
    "DeepseekV4HCACache": CompressedRows,
    "DeepseekV4CSACache": CompressedRows,
    "DummyLayer": lambda *_: NoRows(),
}


def rows_of(cache: cache_utils.DynamicCache, block_size: int, *, is_v4: bool = False) -> tuple[LayerRows, ...]:
    """Readers for all layers of a cache that has seen at least one block.

    is_v4: the model's values are its keys, so only these are kept.
    Raises:  InvalidRequest: a kind of layer that is not kept, or a block size that its groups do not fit.
    """
    found = []
    layers: Sequence[Any] = cache.layers
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        if name not in _KINDS:
            raise InvalidRequest(f"layer {index} keeps a {name}: AntefixCache keeps {', '.join(_KINDS)}")
        if name != "DummyLayer" and not layer.is_initialized:
            raise InvalidRequest(f"the model did not use layer {index} ({name})")
        if is_v4 and name == "DynamicSlidingWindowLayer":
            name = "V4 window"
        found.append(_KINDS[name](layer, block_size))
    return tuple(found)


def _kv_slot(group: str, tensor: Tensor, num_rows: int) -> Slot:
    """Keys or values [1, heads, tokens, head_dim] as rows: a row has one token, head by head."""
    shape = tensor.shape[1], tensor.shape[3]
    return Slot(group=group, num_rows=num_rows, shape=shape, dtype=tensor.dtype, device=tensor.device)


def _tokens(tensor: Tensor) -> Tensor:
    """[1, heads, tokens, head_dim] as [tokens, heads, head_dim]."""
    return tensor[0].transpose(0, 1)


def _heads(rows: Tensor) -> Tensor:
    """[tokens, heads, head_dim] as [1, heads, tokens, head_dim]."""
    return rows.transpose(0, 1)[None].contiguous()
