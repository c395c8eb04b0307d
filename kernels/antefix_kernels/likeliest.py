"""The likeliest token of each row of logits: torch reads a whole row with one program, which takes 29 us on an H200.

Shapes:  S = rows, V = vocabulary, P = parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels.number_formats import check

_COLUMNS = 1024


@triton.jit
def _parts_kernel(logits, tops, places, lows, num_columns, num_parts, stride, COLUMNS: tl.constexpr):
    """The largest logit of one part of a row, the first place that has it, and the smallest logit."""
    s = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = v < num_columns
    x = tl.load(logits + s * stride + v, inside, other=float("-inf")).to(tl.float32)
    is_number = (x == x) & (tl.abs(x) < float("inf"))
    top, place = tl.max(tl.where(x == x, x, float("-inf")), 0, return_indices=True)
    at = s * num_parts + tl.program_id(1)
    tl.store(tops + at, top)
    tl.store(places + at, tl.program_id(1) * COLUMNS + place)
    tl.store(lows + at, tl.min(tl.where(inside & (is_number == 0), 0, 1), 0))


@triton.jit
def _likeliest_kernel(tops, places, lows, tokens, are_numbers, num_parts, PARTS: tl.constexpr):
    """One row's parts: the first place of the largest logit, and whether all logits are finite."""
    s = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    inside = p < num_parts
    _, part = tl.max(tl.load(tops + s * num_parts + p, inside, other=float("-inf")), 0, return_indices=True)
    tl.store(tokens + s, tl.load(places + s * num_parts + part).to(tl.int64))
    tl.store(are_numbers + s, tl.min(tl.load(lows + s * num_parts + p, inside, other=1), 0) != 0)


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place of each row's largest logit, and whether all of the row's logits are finite. A row that has NaN
    gets some place.

    Shapes:  logits [S, V] float32 or bfloat16, last dim contiguous. Returns [S] int64 and [S] bool.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check(logits.dim() == 2 and logits.stride(1) == 1 and logits.shape[1] > 0, "logits must be [S, V], contiguous rows")
    check(logits.dtype in (torch.float32, torch.bfloat16), f"need float32 or bfloat16, got {logits.dtype}")
    num_rows, num_columns = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    are_numbers = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if not num_rows:
        return tokens, are_numbers
    num_parts = triton.cdiv(num_columns, _COLUMNS)
    tops = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    places, lows = (torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device) for _ in range(2))
    _parts_kernel[(num_rows, num_parts)](
        logits, tops, places, lows, num_columns, num_parts, logits.stride(0), COLUMNS=_COLUMNS, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    _likeliest_kernel[(num_rows,)](
        tops, places, lows, tokens, are_numbers, num_parts, PARTS=triton.next_power_of_2(num_parts), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, are_numbers
