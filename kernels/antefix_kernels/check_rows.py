"""Find rows that hold a pair of bytes beyond a limit: one launch for all rows of a restore.

Shapes:  B = rows of the pool, W = pairs of bytes per row, N = rows to check.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels.number_formats import check

_PAIRS = 4096


@triton.jit
def _rows_over_kernel(pairs, ids, masks, limits, over, num_pairs, PAIRS: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    live = at < num_pairs
    value = tl.load(pairs + tl.load(ids + row) * num_pairs + at, live, other=0).to(tl.int32) & 0xFFFF
    first = (value & tl.load(masks + at, live, other=0)) > tl.load(limits + at, live, other=0)
    second_at = num_pairs + at
    second = (value & tl.load(masks + second_at, live, other=0)) > tl.load(limits + second_at, live, other=0)
    found = tl.max((first | second).to(tl.int32), axis=0)
    # Programs of one row that find something all write the same value.
    tl.store(over + row, found, mask=found > 0)


def rows_over(rows: torch.Tensor, ids: torch.Tensor, masks: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Whether a pair of bytes of a row, read as one little-endian number and masked, exceeds its limit: [N] bool.

    Shapes:  rows [B, 2 W] uint8; ids [N] int64 in [0, B); masks, limits [2, W] int32: two checks per pair.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check(rows.dtype == torch.uint8 and rows.is_contiguous(), "rows must be contiguous bytes")
    check(ids.dtype == torch.int64 and ids.is_contiguous(), "ids must be contiguous int64")
    num_pairs = rows.shape[1] // 2
    for each in (masks, limits):
        check(each.dtype == torch.int32 and each.is_contiguous(), "masks and limits must be contiguous int32")
        check(each.shape == (2, num_pairs) and not rows.shape[1] % 2, "masks and limits must have two numbers per pair")
    over = torch.zeros(len(ids), dtype=torch.int32, device=rows.device)
    if len(ids):
        grid = (len(ids), triton.cdiv(num_pairs, _PAIRS))
        _rows_over_kernel[grid](
            rows.view(torch.int16),
            ids,
            masks,
            limits,
            over,
            num_pairs,
            PAIRS=_PAIRS,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return over.bool()
