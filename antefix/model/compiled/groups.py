"""The kernel that closes groups as functions of tensors, called by `ops.TorchOps` and by `compiled.steps`.

Shapes:  G = groups, m = ratio, S = a compressor's columns, C = entry width, R = RoPE dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from antefix.layout import KVFormat, Part, PartKind
from antefix.model.compiled import group_kernels
from antefix.model.compiled.switch import exponential_address
from antefix.model.compiled.tokens import lanes

if TYPE_CHECKING:
    from antefix.model.compressor import Compressor
    from antefix.model.ops import Entries
    from antefix.model.pool import BlockPool

_Integers = np.ndarray[Any, np.dtype[np.int64]]


def close_line(
    compressor: Compressor, rows: Tensor, overlap: Tensor | None, cos: Tensor, sin: Tensor, to: Entries, first: int
) -> bool:
    """`TorchOps.compress_and_pack`. Returns False if torch has to do it; then nothing was written."""
    indices = np.arange(first, first + rows.shape[1])
    blocks = to.block_ids.numpy()[indices // to.part.num_rows]
    return close_groups(compressor, rows, overlap, cos, sin, to.pool, to.part, blocks, indices % to.part.num_rows)


def close_groups(
    compressor: Compressor,
    rows: Tensor,
    overlaps: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pool: BlockPool,
    part: Part,
    blocks: _Integers,
    places: _Integers,
) -> bool:
    """Pool the rows [2, G, m, S] into entries, and write these to rows `places` [G] of blocks `blocks` [G].

    overlaps: the Ca rows [2, m, C] before the first group, if each group follows the one before it; otherwise those
    before each group [2, G, m, C]. None: HCA.  Returns False for another format than FP8, and if an entry is not
    finite; then nothing was written.
    """
    if pool.layout.kv_format is not KVFormat.FP8:
        return False
    if not rows[0].is_contiguous():
        rows = rows.contiguous()
    cos, sin, decoded = cos.contiguous(), sin.contiguous(), pool.decoded(part)
    before = (0, 0, 0)
    if overlaps is not None:
        overlaps = overlaps.contiguous()
        before = overlaps.data_ptr(), overlaps.stride(0), overlaps.stride(1) if overlaps.dim() == 4 else 0
    _, num, ratio, columns = rows.shape
    fields = np.array(
        [rows.data_ptr(), rows.stride(0), num, ratio, columns, compressor.width, *before, 2 * cos.shape[1],
         pool.rows.data_ptr() + part.offset, pool.rows.stride(0), part.record.nbytes, decoded.data_ptr(),
         decoded.stride(0), part.kind is PartKind.INDEXER_KEYS, exponential_address(), lanes()],
        np.int64,
    )  # fmt: skip
    norm = compressor.kv_norm
    failed = group_kernels.close_groups(
        fields.ctypes.data, blocks.ctypes.data, places.ctypes.data, cos.data_ptr(), sin.data_ptr(),
        norm.weight.data_ptr(), norm.eps,
    )  # fmt: skip
    return not failed
