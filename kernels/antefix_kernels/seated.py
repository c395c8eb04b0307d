"""Tails and overlap states of many sequences' compressors, by seat: what a decode step writes of them.

Shapes:  S = sequences, one token each; P = seats; m = ratio; C = entry width, X = columns of a compressor's rows (C, or
         2 C where groups overlap); L = layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels.number_formats import check

_COLUMNS = 1024


@triton.jit
def _tails_kernel(kv, gate, bias, positions, seats, tails, stride_kv, stride_gate, X, M: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """One token's kv, and its gate with the bias of its place in the group added."""
    s = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = x < X
    place = tl.load(positions + s) % M
    row = tails + (tl.load(seats + s).to(tl.int64) * (2 * M) + place) * X + x
    tl.store(row, tl.load(kv + s * stride_kv + x, used, other=0.0).to(tl.float32), used)
    z = tl.load(gate + s * stride_gate + x, used, other=0.0).to(tl.float32)
    tl.store(row + M * X, z + tl.load(bias + place * X + x, used, other=0.0), used)


@triton.jit
def _overlaps_kernel(tails, overlaps, seats, closes, num_seats, M: tl.constexpr, C: tl.constexpr,
                     COLUMNS: tl.constexpr):  # fmt: skip
    """The first series of the group that one sequence has closed in one layer, rows of kv and then of gates."""
    s = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    if tl.load(closes + s) != 0:
        seat = tl.load(seats + s).to(tl.int64)
        for start in range(0, 2 * M * C, COLUMNS):
            i = start + tl.arange(0, COLUMNS)
            used = i < 2 * M * C
            row, column = i // C, i % C
            x = tl.load(tails + ((layer * num_seats + seat) * (2 * M) + row) * (2 * C) + column, used, other=0.0)
            half, place = row // M, row % M
            at = (((layer * 2 + half) * num_seats + seat) * M + place) * C + column
            tl.store(overlaps + at, x, used)


def write_tails(
    kv: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
    seats: torch.Tensor,
    tails: torch.Tensor,
) -> None:
    """Put each token's compressor rows into its sequence's unfinished group.

    Shapes:  kv, gate [S, X] float32 or bfloat16, last dim contiguous; bias [m, X] float32; positions, seats [S] int32;
             tails [P, 2, m, X] float32, contiguous. Two tokens of one seat must not differ in place.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.1; oracle: antefix.model.compressor.Compressor.project.
    """
    num_tokens, columns = kv.shape
    m = bias.shape[0]
    check(kv.shape == gate.shape and kv.stride(1) == gate.stride(1) == 1, "kv and gate must be [S, X], contiguous rows")
    check(bias.shape == (m, columns) and bias.dtype is torch.float32 and bias.is_contiguous(), "bias: [m, X] float32")
    check(tails.dim() == 4 and tuple(tails.shape[1:]) == (2, m, columns), f"tails must be [P, 2, {m}, {columns}]")
    check(tails.is_contiguous() and tails.dtype is torch.float32, "tails must be contiguous float32")
    _check_numbers(num_tokens, positions, seats)
    if num_tokens:
        _tails_kernel[(num_tokens, triton.cdiv(columns, _COLUMNS))](
            kv,
            gate,
            bias,
            positions,
            seats,
            tails,
            kv.stride(0),
            gate.stride(0),
            columns,
            M=m,
            COLUMNS=_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def move_overlaps(tails: torch.Tensor, overlaps: torch.Tensor, seats: torch.Tensor, closes: torch.Tensor) -> None:
    """Of sequences that have closed a group, keep its first series for the group that follows, in every layer.

    Shapes:  tails [L, P, 2, m, 2 C] and overlaps [L, 2, P, m, C] float32, contiguous; seats, closes [S] int32.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    num_layers, num_seats, _, m, columns = tails.shape
    width = columns // 2
    check(overlaps.shape == (num_layers, 2, num_seats, m, width), "overlaps do not belong to tails")
    for array in (tails, overlaps):
        check(array.is_contiguous() and array.dtype is torch.float32, "tails and overlaps must be contiguous float32")
    _check_numbers(len(seats), seats, closes)
    if len(seats) and num_layers:
        _overlaps_kernel[(len(seats), num_layers)](
            tails,
            overlaps,
            seats,
            closes,
            num_seats,
            M=m,
            C=width,
            COLUMNS=_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _check_numbers(num_tokens: int, *arrays: torch.Tensor) -> None:
    for array in arrays:
        check(array.shape == (num_tokens,) and array.dtype is torch.int32, "positions, seats and the like: [S] int32")
        check(array.is_contiguous(), "positions, seats and the like must be contiguous")
