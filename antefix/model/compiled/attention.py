"""The attention kernels as functions of tensors, called by `ops.TorchOps` and by `compiled.steps`.

Each function gives the bits of the torch code that calls it; `check.enable` has compared the two.

Shapes:  T = tokens of one sequence's chunk, H = heads, C = head dim (entries) or indexer dim (keys), I = indexer heads,
         k = entries a query keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from antefix.model.compiled import attention_kernels, index_kernels
from antefix.model.compiled.switch import exponential_address
from antefix.model.compiled.tokens import lanes
from antefix.model.numerics import SUM_TILE

if TYPE_CHECKING:
    from antefix.layout import Part
    from antefix.model.attend import WindowLine
    from antefix.model.ops import Entries
    from antefix.model.pool import BlockPool

Integers = np.ndarray[Any, np.dtype[np.int64]]


def places_of(pool: BlockPool, part: Part, tables: Tensor) -> Integers:
    """`stored_rows.Place` of a part of the pool. tables: the block table of all queries, or one table per query. The
    tensors must live as long as the array is used."""
    decoded = pool.decoded(part)
    step = tables.stride(0) if tables.dim() == 2 else 0
    return np.array([decoded.data_ptr(), decoded.stride(0), part.num_rows, tables.data_ptr(), step], np.int64)


def sizes_of(heads: int, channels: int, window: int, far: int = 0, segment: int = 1) -> Integers:
    """`attention_kernels.Size` of a layer."""
    return np.array([heads, channels, window, far, segment, SUM_TILE, lanes(), exponential_address()], np.int64)


def attend(
    q_THC: Tensor,
    window: WindowLine,
    sinks_H: Tensor,
    entries: Entries | None,
    *,
    picked_Tk: Tensor | None = None,
    num_visible_T: Tensor | None = None,
    segment: int = 1,
) -> Tensor:
    """Attention over the window and some entries, given by their indices or as the first visible ones: [T, H, C]."""
    q, values, sinks = q_THC.contiguous(), window.values, sinks_H.contiguous()
    made, (num, heads, size) = torch.empty_like(q), q.shape
    places, far = None, 0
    if entries is not None:
        tables = entries.block_ids.contiguous()
        places = places_of(entries.pool, entries.part, tables)
        if picked_Tk is not None:
            picked_Tk = picked_Tk.contiguous()
            far = segment = picked_Tk.shape[1]
        elif num_visible_T is not None:
            far = int(num_visible_T.max())
    sizes = sizes_of(heads, size, values.shape[1], far, segment)
    attention_kernels.attend_line(
        made.data_ptr(), q.data_ptr(), sinks.data_ptr(), values.data_ptr(), window.position, window.cut, num,
        sizes.ctypes.data, 0 if places is None else places.ctypes.data, _address(picked_Tk), _address(num_visible_T),
    )  # fmt: skip
    return made


def best_entries(queries_TIC: Tensor, weights_TI: Tensor, keys: Entries, num_visible_T: Tensor, k: int) -> Tensor:
    """`TorchOps.indexer_topk` for rounded queries."""
    tables, visible = keys.block_ids.contiguous(), num_visible_T.contiguous()
    return pick(queries_TIC, weights_TI, places_of(keys.pool, keys.part, tables), visible, int(visible.max()), k)


def pick(queries: Tensor, weights: Tensor, places: Integers, visible: Tensor, most: int, k: int) -> Tensor:
    """Each query's k best visible entries [N, k], ascending, then -1. most: no query sees more entries."""
    queries, weights = queries.contiguous(), weights.contiguous()
    num, heads, size = queries.shape
    picked = torch.empty((num, k), dtype=torch.long)
    index_kernels.pick(
        picked.data_ptr(), queries.data_ptr(), weights.data_ptr(), places.ctypes.data, visible.data_ptr(), num, most,
        heads, size, k, SUM_TILE,
    )  # fmt: skip
    return picked


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
