"""Reads and writes tails and overlap states of many sequences' compressors, by seat, as a step needs them.

Shapes:  S = sequences, one token each; P = seats; m = ratio; C = entry width, X = columns of a compressor's rows (C, or
         2 C where groups overlap); L = layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.number_formats import check

_COLUMNS = 1024


@triton.jit
def _tails_kernel(kv, gate, bias, positions, seats, tails, stride_kv, stride_gate, X, M: tl.constexpr,
                  COLUMNS: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """One token's kv, and its gate with the bias of its place in the group added."""
    follow(CHAINED)
    s = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = x < X
    place = tl.load(positions + s) % M
    row = tails + (tl.load(seats + s).to(tl.int64) * (2 * M) + place) * X + x
    tl.store(row, tl.load(kv + s * stride_kv + x, used, other=0.0).to(tl.float32), used)
    z = tl.load(gate + s * stride_gate + x, used, other=0.0).to(tl.float32)
    tl.store(row + M * X, z + tl.load(bias + place * X + x, used, other=0.0), used)


@triton.jit(do_not_specialize=["num_rows"])
def _lines_kernel(kv, gate, bias, positions, owners, seats, firsts, starts, tails, line, new, stride_kv, stride_gate,
                  stride_line, stride_new, num_rows, X, M: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One new token's kv, and its gate with its bias; behind the last token comes a row of a sequence's unfinished
    group.
    """
    n = tl.program_id(0)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = x < X
    if n < num_rows:
        i = n.to(tl.int64)
        place = tl.load(positions + n) % M
        owner = tl.load(owners + n)
        row = (owner * M + n + tl.load(firsts + owner) % M).to(tl.int64) * X + x
        v = tl.load(kv + i * stride_kv + x, used, other=0.0).to(tl.float32)
        z = tl.load(gate + i * stride_gate + x, used, other=0.0).to(tl.float32)
        z += tl.load(bias + place * X + x, used, other=0.0)
        tl.store(line + row, v, used)
        tl.store(line + stride_line + row, z, used)
        tl.store(new + i * X + x, v, used)
        tl.store(new + stride_new + i * X + x, z, used)
    else:
        s = (n - num_rows) // M
        place = (n - num_rows) % M
        if place < tl.load(firsts + s) % M:
            old = tails + (tl.load(seats + s).to(tl.int64) * (2 * M) + place) * X + x
            row = (s * M + tl.load(starts + s) + place).to(tl.int64) * X + x
            tl.store(line + row, tl.load(old, used, other=0.0), used)
            tl.store(line + stride_line + row, tl.load(old + M * X, used, other=0.0), used)


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
            **chained.options(kv),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Where rows of sequences that run several tokens lie.

    For each row, its position and its sequence's number [N] int32; for each sequence, its seat, its position before its
    first row, and that row [S] int32, ascending.
    """

    positions: torch.Tensor
    owners: torch.Tensor
    seats: torch.Tensor
    firsts: torch.Tensor
    starts: torch.Tensor


def line_up_rows(
    kv: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    lines: Lines,
    tails: torch.Tensor,
    line: torch.Tensor,
    new: torch.Tensor,
) -> None:
    """Put each sequence's new rows in line after those of its unfinished group, and also store the new rows separately.

    Row n of sequence s lies in row s * m + n + firsts[s] % m of the line, row j of its unfinished group in row
    s * m + starts[s] + j. Rows of memory that belong to no sequence are not written.

    Shapes:  kv, gate [N, X] float32 or bfloat16, last dim contiguous; bias [m, X] float32; lines as in its class;
             tails [P, 2, m, X], line [2, N + S * m, X] and new [2, at least N, X] float32, contiguous: kv, then gates
             with their bias.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.1; oracle: antefix.model.compressor.Compressor.project.
    """
    num_rows, columns = kv.shape
    m, num_sequences = bias.shape[0], len(lines.seats)
    check(kv.shape == gate.shape and kv.stride(1) == gate.stride(1) == 1, "kv and gate must be [N, X], contiguous rows")
    check(bias.shape == (m, columns) and bias.dtype is torch.float32 and bias.is_contiguous(), "bias: [m, X] float32")
    check(tails.dim() == 4 and tuple(tails.shape[1:]) == (2, m, columns), f"tails must be [P, 2, {m}, {columns}]")
    check(line.shape == (2, num_rows + num_sequences * m, columns), "line must be [2, N + S * m, X]")
    check(new.shape[0] == 2 and new.shape[1] >= num_rows and new.shape[2] == columns, "new must be [2, N, X]")
    for array in (tails, line, new):
        check(array.is_contiguous() and array.dtype is torch.float32, "tails, line and new: contiguous float32")
    _check_numbers(num_rows, lines.positions, lines.owners)
    _check_numbers(num_sequences, lines.seats, lines.firsts, lines.starts)
    if num_rows:
        _lines_kernel[(num_rows + num_sequences * m, triton.cdiv(columns, _COLUMNS))](
            kv,
            gate,
            bias,
            lines.positions,
            lines.owners,
            lines.seats,
            lines.firsts,
            lines.starts,
            tails,
            line,
            new,
            kv.stride(0),
            gate.stride(0),
            line.stride(0),
            new.stride(0),
            num_rows,
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
